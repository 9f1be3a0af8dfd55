"""Small chapters, written for one test."""

from pathlib import Path

HEAD = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# (chap:{label})=
# # A chapter

# %% tags=["parameters"]
profile = ""
factor = 2

"""


def write_chapter(project: Path, name: str, *cells: str) -> Path:
    path = project / "notebooks" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    head = HEAD.replace("{label}", name.partition("_")[2])
    path.write_text(head + "\n\n".join(f"# %%\n{cell}" for cell in cells) + "\n")
    return path
