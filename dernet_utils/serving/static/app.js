// The page: it sends films, shows what comes back, and keeps nothing.
const $ = (id) => document.getElementById(id);
const DASHES = { "-": [], "--": [8, 5], "-.": [9, 4, 2, 4], ":": [2, 4] };
const films = []; // { name, file, waiting, override, said, grey, view, heat, error }
let current = -1;
let answering = false;
let token = "";
let model = { lesion_types: {}, networks: {} };
const hidden = new Set(); // lesion types that are switched off

// --- The server ---------------------------------------------------------------------------

async function call(path, options = {}) {
  const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...options.headers };
  for (let tries = 0; ; tries += 1) {
    const response = await fetch(`/api/v1/${path}`, { ...options, headers }).catch(() => {
      throw new Error("The request could not be sent: see that the server runs, and check the token if it wants one.");
    });
    if (response.status === 503 && tries < 30) {
      const seconds = Number(response.headers.get("Retry-After") || 2);
      await new Promise((done) => setTimeout(done, 1000 * seconds));
      continue;
    }
    if (response.status === 401) $("token-form").hidden = false;
    if (!response.ok) {
      const said = await response.json().catch(() => ({}));
      throw new Error(said.error || `The server answers ${response.status}.`);
    }
    return response;
  }
}

const send = (path, file) =>
  call(path, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });

async function start() {
  model = await (await call("model")).json();
  $("about").textContent = `${model.made_by}; profile ${model.profile}` +
    (model.virtual ? "; the networks learnt from virtual radiographs only." : ".");
  const names = await (await call("samples")).json();
  $("samples").hidden = !names.length;
  $("sample-list").replaceChildren(...names.map((name) => {
    const button = element("button", name, { type: "button" });
    button.addEventListener("click", async () => {
      try {
        const blob = await (await call(`samples/${encodeURIComponent(name)}`)).blob();
        await take([new File([blob], name)]);
      } catch (error) { tell(error); }
    });
    return button;
  }));
}

// --- Films --------------------------------------------------------------------------------

async function take(list) {
  const fresh = [...list].map((file) => ({ name: file.name, file, waiting: true, override: false }));
  if (!fresh.length) return;
  films.push(...fresh);
  if (!answering) choose(films.indexOf(fresh[0]));
  else showList();
  await answerAll();
}

async function answerAll() {
  if (answering) return; // the loop that runs comes to these, too
  answering = true;
  const done = [];
  $("progress").hidden = false;
  for (let film; (film = films.find((one) => one.waiting)); done.push(film)) {
    const total = done.length + films.filter((one) => one.waiting).length;
    $("status").textContent = `Answering ${done.length + 1} of ${total} …`;
    $("progress").value = done.length / total;
    await ask(film);
    if (film === films[current]) choose(current);
    else showList();
  }
  $("status").textContent = summary(done);
  $("progress").hidden = true;
  answering = false;
}

function summary(asked) {
  const failed = asked.filter((film) => film.error).map((film) => ` ${film.name}: ${film.error}`);
  const films = asked.length === 1 ? "film" : "films";
  const answered = asked.length - failed.length;
  return `${answered}${failed.length ? ` of ${asked.length}` : ""} ${films} answered.${failed.join("")}`;
}

async function ask(film) {
  try {
    const query = `analyse?picture=true&override=${film.override}`;
    const { picture, ...said } = await (await send(query, film.file)).json();
    const grey = await pixels(picture);
    Object.assign(film, { said, grey, view: film.view ?? freshView(), error: "" });
  } catch (error) {
    film.error = error.message;
  }
  film.waiting = false;
}

async function pixels(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const sheet = new OffscreenCanvas(bitmap.width, bitmap.height);
  const pen = sheet.getContext("2d", { willReadFrequently: true });
  pen.drawImage(bitmap, 0, 0);
  const data = pen.getImageData(0, 0, bitmap.width, bitmap.height).data;
  const grey = new Uint8ClampedArray(bitmap.width * bitmap.height);
  for (let k = 0; k < grey.length; k += 1) grey[k] = data[4 * k];
  return { width: bitmap.width, height: bitmap.height, grey };
}

const freshView = () => ({ level: 128, window: 256, invert: false, heat: false, zoom: 1, x: 0, y: 0 });

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function verdict(film) {
  if (film.waiting) return "waiting";
  if (film.error) return film.error;
  if (film.said.rejected) return "rejected";
  return `${film.said.decision}, score ${film.said.score.toFixed(2)}`;
}

function showList() {
  const focused = [...$("films").children].findIndex((item) => item.contains(document.activeElement));
  $("films").replaceChildren(...films.map((film, number) => {
    const item = element("li");
    const button = element("button", film.name, { type: "button" });
    if (number === current) button.setAttribute("aria-current", "true");
    button.append(element("small", verdict(film)));
    button.addEventListener("click", () => choose(number));
    item.append(button);
    return item;
  }));
  if (focused >= 0) $("films").children[focused].firstChild.focus();
}

function choose(number) {
  current = number;
  const film = films[number];
  for (const other of films) if (other !== film) other.sheet = other.sheetKey = null;
  showList();
  $("viewer").hidden = !film.grey;
  $("answer").hidden = !film.grey;
  if (!film.grey) return;
  showTools(film);
  showAnswer(film);
  render();
}

// --- The answer ---------------------------------------------------------------------------

function showAnswer(film) {
  const said = film.said;
  $("rejection").hidden = !said.rejected;
  $("verdict").hidden = said.rejected;
  $("reasons").replaceChildren(...said.reasons.map((reason) => element("li", reason.text)));
  if (said.rejected) return;
  $("decision").textContent = said.decision === "abnormal" ? "Abnormal" : "Normal";
  $("decision").className = said.decision;
  $("overridden").hidden = !said.overridden;
  $("overridden").textContent = `A person overrode a rejection: ${said.reasons.map((r) => r.text).join(" ")}`;
  const networks = Object.entries(said.networks).map(([name, prob]) => [model.networks[name] ?? name, prob]);
  const scores = [["DERNet", said.score, said.threshold], ...networks];
  $("scores").replaceChildren(...scores.map(([name, value, mark]) => bar(name, value, mark)));
  $("none").hidden = said.boxes.length > 0;
  $("none").textContent = said.decision === "abnormal"
    ? "The detector found none."
    : "Not looked for: the detector is asked about abnormal films only.";
  $("boxes-part").hidden = !said.boxes.length;
  const types = [...new Set(said.boxes.map((box) => box.lesion_type))];
  $("types").replaceChildren(...types.map(typeSwitch));
  allowDicom(film.dicom);
  isDicom(film).then((yes) => {
    film.dicom = yes;
    if (film === films[current]) allowDicom(yes);
  });
  showBoxes(film);
}

function allowDicom(yes) {
  for (const button of document.querySelectorAll("#reports .dicom")) button.disabled = !yes;
}

async function isDicom(film) {
  return (await film.file.slice(128, 132).text()) === "DICM";
}

function bar(name, value, mark) {
  const made = element("div", "", { class: "bar" });
  const line = element("span");
  const text = mark === undefined ? value.toFixed(2) : `${value.toFixed(2)}, threshold ${mark.toFixed(2)}`;
  line.append(element("span", name), element("span", text));
  const track = element("div", "", { class: "track" });
  const filled = element("i");
  filled.style.width = `${100 * value}%`;
  track.append(filled);
  if (mark !== undefined) {
    const line_at = element("b");
    line_at.style.left = `${100 * mark}%`;
    track.append(line_at);
  }
  made.append(line, track);
  return made;
}

function typeSwitch(type) {
  const label = element("label");
  const box = element("input", "", { type: "checkbox" });
  box.checked = !hidden.has(type);
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(type);
    else hidden.add(type);
    showBoxes(films[current]);
    render();
  });
  const swatch = element("span", "", { class: "swatch" });
  swatch.style.borderTopColor = model.lesion_types[type]?.colour;
  label.append(box, swatch, element("span", type));
  return label;
}

const visible = (said) =>
  said.boxes.filter((box) => !hidden.has(box.lesion_type) && box.score >= Number($("least").value));

function showBoxes(film) {
  $("least-shown").textContent = Number($("least").value).toFixed(2);
  $("boxes").replaceChildren(...visible(film.said).map((box) => {
    const row = element("tr");
    const place = ["xmin", "ymin", "xmax", "ymax"].map((edge) => Math.round(box[edge]));
    const [x0, y0, x1, y1] = place;
    row.append(
      element("th", box.lesion_type, { scope: "row" }), element("td", box.score.toFixed(2)),
      element("td", `${x0}–${x1}\n${y0}–${y1}`),
    );
    return row;
  }));
}

// --- The view -----------------------------------------------------------------------------

function showTools(film) {
  $("level").value = film.view.level;
  $("window").value = film.view.window;
  $("invert").setAttribute("aria-pressed", film.view.invert);
  $("heat").setAttribute("aria-pressed", film.view.heat);
  $("heat").disabled = film.said.rejected;
}

function windowed(film) {
  const { level, window: width, invert } = film.view;
  const table = new Uint8ClampedArray(256);
  for (let k = 0; k < 256; k += 1) {
    const shown = 255 * ((k - level) / width + 0.5);
    table[k] = invert ? 255 - shown : shown;
  }
  const { grey } = film.grey;
  const image = new ImageData(film.grey.width, film.grey.height);
  for (let k = 0; k < grey.length; k += 1) {
    const shown = table[grey[k]];
    image.data[4 * k] = shown;
    image.data[4 * k + 1] = shown;
    image.data[4 * k + 2] = shown;
    image.data[4 * k + 3] = 255;
  }
  return image;
}

function render() {
  const film = films[current];
  const canvas = $("canvas");
  const ratio = globalThis.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  const pen = canvas.getContext("2d");
  const { width, height } = film.grey;
  const fit = Math.min(canvas.width / width, canvas.height / height) * film.view.zoom;
  pen.setTransform(
    fit, 0, 0, fit,
    canvas.width / 2 + film.view.x * ratio - (fit * width) / 2,
    canvas.height / 2 + film.view.y * ratio - (fit * height) / 2,
  );
  const key = `${film.view.level} ${film.view.window} ${film.view.invert}`;
  if (film.sheetKey !== key) {
    film.sheet = new OffscreenCanvas(width, height);
    film.sheet.getContext("2d").putImageData(windowed(film), 0, 0);
    film.sheetKey = key;
  }
  pen.drawImage(film.sheet, 0, 0);
  if (film.view.heat && film.heat) {
    pen.globalAlpha = 0.45;
    pen.drawImage(film.heat, 0, 0, width, height);
    pen.globalAlpha = 1;
  }
  const boxes = film.said.rejected ? [] : visible(film.said);
  for (const box of boxes) {
    const style = model.lesion_types[box.lesion_type] ?? { colour: "#ffffff", dash: "-" };
    pen.strokeStyle = style.colour;
    pen.lineWidth = (2 * ratio) / fit;
    pen.setLineDash((DASHES[style.dash] ?? []).map((length) => (length * ratio) / fit));
    pen.strokeRect(box.xmin, box.ymin, box.xmax - box.xmin, box.ymax - box.ymin);
  }
  canvas.setAttribute("aria-label", `${film.name}: ${verdict(film)}, ${boxes.length} lesions shown`);
}

function change(values) {
  const film = films[current];
  Object.assign(film.view, values);
  film.view.level = Math.min(255, Math.max(0, film.view.level));
  film.view.window = Math.min(512, Math.max(1, film.view.window));
  film.view.zoom = Math.min(20, Math.max(0.5, film.view.zoom));
  showTools(film);
  render();
}

async function toggleHeat() {
  const film = films[current];
  if (!film.heat) {
    $("heat").disabled = true;
    try {
      film.heating ??= heatOf(film); // asked for once, whoever clicks again
      film.heat = await film.heating;
    } finally {
      film.heating = null;
      $("heat").disabled = Boolean(films[current].said?.rejected);
    }
    film.view.heat = true;
  } else film.view.heat = !film.view.heat;
  if (film !== films[current]) return;
  showTools(film);
  render();
}

async function heatOf(film) {
  const said = await (await send(`analyse?heat=true&override=${film.override}`, film.file)).json();
  const map = await pixels(said.heat);
  const image = new ImageData(map.width, map.height);
  for (let k = 0; k < map.grey.length; k += 1) {
    const hot = map.grey[k] / 255; // black, red, yellow
    image.data.set([255 * Math.min(1, 2 * hot), 255 * Math.max(0, 2 * hot - 1), 0, 255 * hot], 4 * k);
  }
  const sheet = new OffscreenCanvas(map.width, map.height);
  sheet.getContext("2d").putImageData(image, 0, 0);
  return sheet;
}

// --- What a person does -------------------------------------------------------------------

$("files").addEventListener("change", (event) => {
  const chosen = [...event.target.files];
  event.target.value = ""; // the same file may be chosen again
  take(chosen);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files);
  });
}
$("override").addEventListener("click", async () => {
  const film = films[current];
  film.override = true;
  $("override").disabled = true;
  await ask(film);
  $("override").disabled = false;
  if (film.error) {
    tell(new Error(film.error));
    Object.assign(film, { override: false, error: "" }); // it stays rejected
  }
  if (film !== films[current]) {
    showList();
    return;
  }
  choose(current);
  (film.said.rejected ? $("override") : $("decision")).focus();
});
$("level").addEventListener("input", (event) => change({ level: Number(event.target.value) }));
$("window").addEventListener("input", (event) => change({ window: Number(event.target.value) }));
$("least").addEventListener("input", () => { showBoxes(films[current]); render(); });
$("invert").addEventListener("click", () => change({ invert: !films[current].view.invert }));
$("closer").addEventListener("click", () => change({ zoom: films[current].view.zoom * 1.25 }));
$("farther").addEventListener("click", () => change({ zoom: films[current].view.zoom / 1.25 }));
$("reset").addEventListener("click", () => change(freshView()));
$("heat").addEventListener("click", () => toggleHeat().catch(tell));
$("canvas").addEventListener("wheel", (event) => {
  event.preventDefault();
  change({ zoom: films[current].view.zoom * (event.deltaY < 0 ? 1.1 : 1 / 1.1) });
}, { passive: false });
$("canvas").addEventListener("pointerdown", (event) => event.target.setPointerCapture(event.pointerId));
$("canvas").addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  const view = films[current].view;
  const moves = document.querySelector("input[name=drag]:checked").value === "pan";
  if (moves) change({ x: view.x + event.movementX, y: view.y + event.movementY });
  else change({ window: view.window + event.movementX, level: view.level + event.movementY });
});
$("canvas").addEventListener("keydown", (event) => {
  const view = films[current].view;
  const steps = {
    ArrowLeft: { x: view.x + 30 }, ArrowRight: { x: view.x - 30 },
    ArrowUp: { y: view.y + 30 }, ArrowDown: { y: view.y - 30 },
    "+": { zoom: view.zoom * 1.25 }, "-": { zoom: view.zoom / 1.25 },
    i: { invert: !view.invert }, 0: freshView(),
  };
  if (!steps[event.key] || event.ctrlKey || event.metaKey || event.altKey) return; // the browser's
  event.preventDefault();
  change(steps[event.key]);
});
for (const button of document.querySelectorAll("#reports button")) {
  button.addEventListener("click", async () => {
    try {
      const film = films[current];
      const { form } = button.dataset;
      const response = await send(`report/${form}?override=${film.override}`, film.file);
      const link = element("a", "", { href: URL.createObjectURL(await response.blob()) });
      const ending = { html: "html", json: "json", sr: "sr.dcm", sc: "sc.dcm" }[form];
      link.download = `${film.name}.dernet.${ending}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // when it has surely been saved
    } catch (error) { tell(error); }
  });
}
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  $("token-form").hidden = true;
  start().then(() => {
    for (const film of films) film.waiting = !film.said; // those that were refused for want of it
    return answerAll();
  }).catch((error) => {
    $("token-form").hidden = false;
    tell(error);
  });
});
addEventListener("resize", () => { if (films[current]?.grey) render(); });

function tell(error) { $("status").textContent = error.message; }

start().catch(tell);
