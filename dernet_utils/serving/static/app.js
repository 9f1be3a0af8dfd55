// The page uploads radiographs and shows the results; it stores nothing.
const $ = (id) => document.getElementById(id);
const DASHES = { "-": [], "--": [8, 5], "-.": [9, 4, 2, 4], ":": [2, 4] };
const CORNERS = ["xmin", "ymin", "xmax", "ymax"];
const radiographs = []; // { name, file, waiting, override, result, image, view, heat, error }
let current = -1; // index of the radiograph that is shown
let analysing = false;
let token = "";
let model = { lesion_types: {}, networks: {} };
const hiddenTypes = new Set();

// --- Server -------------------------------------------------------------------------------

async function call(path, options = {}) {
  const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...options.headers };
  for (let tries = 0; ; tries += 1) {
    const response = await fetch(`/api/v1/${path}`, { ...options, headers }).catch(() => {
      throw new Error("The request could not be sent: check that the server is running and, if it needs a token, that the token is right.");
    });
    if (response.status === 503 && tries < 30) {
      const seconds = Number(response.headers.get("Retry-After") || 2);
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
      continue;
    }
    if (response.status === 401) $("token-form").hidden = false;
    if (!response.ok) {
      const body = await response.json().catch(() => ({}));
      throw new Error(body.error || `The server responded with status ${response.status}.`);
    }
    return response;
  }
}

const upload = (path, file) =>
  call(path, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });

async function start() {
  model = await (await call("model")).json();
  $("about").textContent = `${model.made_by}; profile ${model.profile}` +
    (model.virtual ? "; networks trained on virtual radiographs only." : ".");
  const names = await (await call("samples")).json();
  $("samples").hidden = !names.length;
  $("sample-list").replaceChildren(...names.map((name) => {
    const button = element("button", name, { type: "button" });
    button.addEventListener("click", async () => {
      try {
        const blob = await (await call(`samples/${encodeURIComponent(name)}`)).blob();
        await add([new File([blob], name)]);
      } catch (error) { showError(error); }
    });
    return button;
  }));
}

// --- Radiographs --------------------------------------------------------------------------

async function add(files) {
  const added = [...files].map((file) => ({ name: file.name, file, waiting: true, override: false }));
  if (!added.length) return;
  radiographs.push(...added);
  if (!analysing) choose(radiographs.indexOf(added[0]));
  else showList();
  await analyseAll();
}

async function analyseAll() {
  if (analysing) return; // the running loop also analyses these
  analysing = true;
  const finished = [];
  $("progress").hidden = false;
  for (let next; (next = radiographs.find((one) => one.waiting)); finished.push(next)) {
    const total = finished.length + radiographs.filter((one) => one.waiting).length;
    $("status").textContent = `Analysing ${finished.length + 1} of ${total} …`;
    $("progress").value = finished.length / total;
    await analyse(next);
    if (next === radiographs[current]) choose(current);
    else showList();
  }
  $("status").textContent = summary(finished);
  $("progress").hidden = true;
  analysing = false;
}

function summary(finished) {
  const failed = finished.filter((one) => one.error).map((one) => ` ${one.name}: ${one.error}`);
  const analysed = finished.length - failed.length;
  const count = failed.length ? `${analysed} of ${finished.length}` : `${analysed}`;
  const noun = finished.length === 1 ? "radiograph" : "radiographs";
  return `${count} ${noun} analysed.${failed.join("")}`;
}

async function analyse(radiograph) {
  try {
    const query = `analyse?picture=true&override=${radiograph.override}`;
    const { picture, ...result } = await (await upload(query, radiograph.file)).json();
    const image = await decode(picture);
    Object.assign(radiograph, { result, image, view: radiograph.view ?? defaultView(), error: "" });
  } catch (error) {
    radiograph.error = error.message;
  }
  radiograph.waiting = false;
}

async function decode(base64) {
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

const defaultView = () => ({ level: 128, window: 256, invert: false, heat: false, zoom: 1, x: 0, y: 0 });

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function state(radiograph) {
  if (radiograph.waiting) return "waiting";
  if (radiograph.error) return radiograph.error;
  if (radiograph.result.rejected) return "rejected";
  return `${radiograph.result.decision}, score ${radiograph.result.score.toFixed(2)}`;
}

function showList() {
  const list = $("radiographs");
  const focused = [...list.children].findIndex((item) => item.contains(document.activeElement));
  list.replaceChildren(...radiographs.map((radiograph, number) => {
    const item = element("li");
    const button = element("button", radiograph.name, { type: "button" });
    if (number === current) button.setAttribute("aria-current", "true");
    button.append(element("small", state(radiograph)));
    button.addEventListener("click", () => choose(number));
    item.append(button);
    return item;
  }));
  if (focused >= 0) list.children[focused].firstChild.focus();
}

function choose(number) {
  current = number;
  const radiograph = radiographs[number];
  for (const other of radiographs) if (other !== radiograph) other.sheet = other.sheetKey = null;
  showList();
  $("welcome").hidden = Boolean(radiograph.image);
  $("viewer").hidden = !radiograph.image;
  $("result").hidden = !radiograph.image;
  if (!radiograph.image) return;
  showTools(radiograph);
  showResult(radiograph.result);
  render();
}

// --- Result -------------------------------------------------------------------------------

function showResult(result) {
  $("rejection").hidden = !result.rejected;
  $("prediction").hidden = result.rejected;
  const reasons = result.reasons.map((reason) => reason.text);
  $("reasons").replaceChildren(...reasons.map((text) => element("li", text)));
  if (result.rejected) return;
  $("decision").textContent = result.decision === "abnormal" ? "Abnormal" : "Normal";
  $("decision").className = result.decision;
  $("overridden").hidden = !result.overridden;
  $("overridden").textContent = `You overrode the rejection of this file. ${reasons.join(" ")}`;
  const networks = Object.entries(result.networks).map(([name, prob]) => [model.networks[name] ?? name, prob]);
  const scores = [["DERNet", result.score, result.threshold], ...networks];
  $("scores").replaceChildren(...scores.map(([name, value, threshold]) => bar(name, value, threshold)));
  $("none").hidden = result.boxes.length > 0;
  $("none").textContent = result.decision === "abnormal"
    ? "The detector found no lesions."
    : "The detector was not run: it runs only on abnormal radiographs.";
  $("boxes-part").hidden = !result.boxes.length;
  const types = [...new Set(result.boxes.map((box) => box.lesion_type))];
  $("types").replaceChildren(...types.map(typeSwitch));
  for (const button of document.querySelectorAll("#reports .dicom")) {
    button.disabled = result.form !== "DICOM";
    button.title = button.disabled ? "Needs a DICOM image" : "";
  }
  showBoxes(result);
}

function bar(name, value, threshold) {
  const made = element("div", "", { class: "bar" });
  const line = element("span");
  const text = threshold === undefined ? value.toFixed(2) : `${value.toFixed(2)}, threshold ${threshold.toFixed(2)}`;
  line.append(element("span", name), element("span", text));
  const track = element("div", "", { class: "track" });
  const filled = element("i");
  filled.style.width = `${100 * value}%`;
  track.append(filled);
  if (threshold !== undefined) {
    const mark = element("b");
    mark.style.left = `${100 * threshold}%`;
    track.append(mark);
  }
  made.append(line, track);
  return made;
}

function typeSwitch(type) {
  const label = element("label");
  const box = element("input", "", { type: "checkbox" });
  box.checked = !hiddenTypes.has(type);
  box.addEventListener("change", () => {
    if (box.checked) hiddenTypes.delete(type);
    else hiddenTypes.add(type);
    showBoxes(radiographs[current].result);
    render();
  });
  const swatch = element("span", "", { class: "swatch" });
  swatch.style.color = model.lesion_types[type]?.colour;
  swatch.dataset.dash = model.lesion_types[type]?.dash;
  label.append(box, swatch, element("span", type));
  return label;
}

const visibleBoxes = (result) =>
  result.boxes.filter((box) => !hiddenTypes.has(box.lesion_type) && box.score >= Number($("minimum").value));

function showBoxes(result) {
  $("minimum-shown").textContent = Number($("minimum").value).toFixed(2);
  $("boxes").replaceChildren(...visibleBoxes(result).map((box) => {
    const row = element("tr");
    const [x0, y0, x1, y1] = CORNERS.map((edge) => Math.round(box[edge]));
    row.append(
      element("th", box.lesion_type, { scope: "row" }), element("td", box.score.toFixed(2)),
      element("td", `${x0}–${x1}\n${y0}–${y1}`),
    );
    return row;
  }));
}

// --- Viewer -------------------------------------------------------------------------------

function showTools({ view, result }) {
  $("level").value = view.level;
  $("window").value = view.window;
  $("invert").setAttribute("aria-pressed", view.invert);
  $("heat").setAttribute("aria-pressed", view.heat);
  $("heat").disabled = result.rejected;
}

function windowed({ image, view }) {
  const table = new Uint8ClampedArray(256);
  for (let k = 0; k < 256; k += 1) {
    const level = 255 * ((k - view.level) / view.window + 0.5);
    table[k] = view.invert ? 255 - level : level;
  }
  const pixels = new ImageData(image.width, image.height);
  for (let k = 0; k < image.grey.length; k += 1) {
    const level = table[image.grey[k]];
    pixels.data[4 * k] = level;
    pixels.data[4 * k + 1] = level;
    pixels.data[4 * k + 2] = level;
    pixels.data[4 * k + 3] = 255;
  }
  return pixels;
}

function render() {
  const radiograph = radiographs[current];
  const { image, view, result } = radiograph;
  const canvas = $("canvas");
  const ratio = globalThis.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  const pen = canvas.getContext("2d");
  const { width, height } = image;
  const fit = Math.min(canvas.width / width, canvas.height / height) * view.zoom;
  pen.setTransform(
    fit, 0, 0, fit,
    canvas.width / 2 + view.x * ratio - (fit * width) / 2,
    canvas.height / 2 + view.y * ratio - (fit * height) / 2,
  );
  const key = `${view.level} ${view.window} ${view.invert}`;
  if (radiograph.sheetKey !== key) {
    radiograph.sheet = new OffscreenCanvas(width, height);
    radiograph.sheet.getContext("2d").putImageData(windowed(radiograph), 0, 0);
    radiograph.sheetKey = key;
  }
  pen.drawImage(radiograph.sheet, 0, 0);
  if (view.heat && radiograph.heat) {
    pen.globalAlpha = 0.45;
    pen.drawImage(radiograph.heat, 0, 0, width, height);
    pen.globalAlpha = 1;
  }
  const boxes = result.rejected ? [] : visibleBoxes(result);
  for (const box of boxes) {
    const style = model.lesion_types[box.lesion_type] ?? { colour: "#ffffff", dash: "-" };
    pen.strokeStyle = style.colour;
    pen.lineWidth = (2 * ratio) / fit;
    pen.setLineDash((DASHES[style.dash] ?? []).map((length) => (length * ratio) / fit));
    pen.strokeRect(box.xmin, box.ymin, box.xmax - box.xmin, box.ymax - box.ymin);
  }
  const count = boxes.length === 1 ? "1 lesion" : `${boxes.length} lesions`;
  canvas.setAttribute("aria-label", `${radiograph.name}: ${state(radiograph)}, ${count} shown`);
}

function change(values) {
  const radiograph = radiographs[current];
  const view = Object.assign(radiograph.view, values);
  view.level = Math.min(255, Math.max(0, view.level));
  view.window = Math.min(512, Math.max(1, view.window));
  view.zoom = Math.min(20, Math.max(0.5, view.zoom));
  showTools(radiograph);
  render();
}

async function toggleHeat() {
  const radiograph = radiographs[current];
  if (!radiograph.heat) {
    $("heat").disabled = true;
    try {
      radiograph.loadingHeat ??= loadHeat(radiograph); // one request, however often it is clicked
      radiograph.heat = await radiograph.loadingHeat;
    } finally {
      radiograph.loadingHeat = null;
      $("heat").disabled = Boolean(radiographs[current].result?.rejected);
    }
    radiograph.view.heat = true;
  } else radiograph.view.heat = !radiograph.view.heat;
  if (radiograph !== radiographs[current]) return;
  showTools(radiograph);
  render();
}

async function loadHeat(radiograph) {
  const query = `analyse?heat=true&override=${radiograph.override}`;
  const result = await (await upload(query, radiograph.file)).json();
  const map = await decode(result.heat);
  const pixels = new ImageData(map.width, map.height);
  for (let k = 0; k < map.grey.length; k += 1) {
    const heat = map.grey[k] / 255; // transparent black, red, yellow
    pixels.data.set([255 * Math.min(1, 2 * heat), 255 * Math.max(0, 2 * heat - 1), 0, 255 * heat], 4 * k);
  }
  const sheet = new OffscreenCanvas(map.width, map.height);
  sheet.getContext("2d").putImageData(pixels, 0, 0);
  return sheet;
}

// --- Events -------------------------------------------------------------------------------

$("files").addEventListener("change", (event) => {
  const chosen = [...event.target.files];
  event.target.value = ""; // the same file may be chosen again
  add(chosen);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) add(event.dataTransfer.files);
  });
}
$("override").addEventListener("click", async () => {
  const radiograph = radiographs[current];
  radiograph.override = true;
  $("override").disabled = true;
  await analyse(radiograph);
  $("override").disabled = false;
  if (radiograph.error) {
    showError(new Error(radiograph.error));
    Object.assign(radiograph, { override: false, error: "" }); // it stays rejected
  }
  if (radiograph !== radiographs[current]) {
    showList();
    return;
  }
  choose(current);
  (radiograph.result.rejected ? $("override") : $("decision")).focus();
});
$("level").addEventListener("input", (event) => change({ level: Number(event.target.value) }));
$("window").addEventListener("input", (event) => change({ window: Number(event.target.value) }));
$("minimum").addEventListener("input", () => { showBoxes(radiographs[current].result); render(); });
$("invert").addEventListener("click", () => change({ invert: !radiographs[current].view.invert }));
$("zoom-in").addEventListener("click", () => change({ zoom: radiographs[current].view.zoom * 1.25 }));
$("zoom-out").addEventListener("click", () => change({ zoom: radiographs[current].view.zoom / 1.25 }));
$("reset").addEventListener("click", () => change(defaultView()));
$("heat").addEventListener("click", () => toggleHeat().catch(showError));
$("canvas").addEventListener("wheel", (event) => {
  event.preventDefault();
  change({ zoom: radiographs[current].view.zoom * (event.deltaY < 0 ? 1.1 : 1 / 1.1) });
}, { passive: false });
$("canvas").addEventListener("pointerdown", (event) => event.target.setPointerCapture(event.pointerId));
$("canvas").addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  const view = radiographs[current].view;
  const pans = document.querySelector("input[name=drag]:checked").value === "pan";
  if (pans) change({ x: view.x + event.movementX, y: view.y + event.movementY });
  else change({ window: view.window + event.movementX, level: view.level + event.movementY });
});
$("canvas").addEventListener("keydown", (event) => {
  const view = radiographs[current].view;
  const keys = {
    ArrowLeft: { x: view.x + 30 }, ArrowRight: { x: view.x - 30 },
    ArrowUp: { y: view.y + 30 }, ArrowDown: { y: view.y - 30 },
    "+": { zoom: view.zoom * 1.25 }, "-": { zoom: view.zoom / 1.25 },
    i: { invert: !view.invert }, 0: defaultView(),
  };
  if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return; // a key of the browser's
  event.preventDefault();
  change(keys[event.key]);
});
for (const button of document.querySelectorAll("#reports button")) {
  button.addEventListener("click", async () => {
    try {
      const radiograph = radiographs[current];
      const { form } = button.dataset;
      const response = await upload(`report/${form}?override=${radiograph.override}`, radiograph.file);
      const link = element("a", "", { href: URL.createObjectURL(await response.blob()) });
      const ending = { html: "html", json: "json", sr: "sr.dcm", sc: "sc.dcm" }[form];
      link.download = `${radiograph.name}.dernet.${ending}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // long after it has been saved
    } catch (error) { showError(error); }
  });
}
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  $("token-form").hidden = true;
  start().then(() => {
    for (const one of radiographs) one.waiting = !one.result; // those refused without a token
    return analyseAll();
  }).catch((error) => {
    $("token-form").hidden = false;
    showError(error);
  });
});
addEventListener("resize", () => { if (radiographs[current]?.image) render(); });

function showError(error) { $("status").textContent = error.message; }

start().catch(showError);
