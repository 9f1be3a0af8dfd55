# The commands of the README; continuous integration uses them too.
#
#   make book [PROFILE=smoke|laptop|night|paper]   execute what changed, build the pages
#   make test                                every test, including chapters and pages
#   make test-quick                          the quick tests only
#   make lab                                 JupyterLab on the chapters
#   make serve [PROFILE=…]                   the web app, with the last run's networks
#   make edition                             train the edition's networks, for many hours; resumable
#   make clean                               delete what runs have made; keep the environment
#   make lock                                rewrite requirements.lock from pyproject.toml

PROFILE ?= laptop
PYTHON ?= python3
BIN := .venv/bin
# The stamp's name contains the lock file's digest: a changed lock file makes a new environment.
LOCKED := .venv/locked-$(shell sha256sum requirements.lock 2>/dev/null | cut -c1-16)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# A kernel runs in the folder of its notebook, so relative paths in DERNET_DATA and the like are made absolute first.
export ABSOLUTE := import os, sys; from dernet_utils.core.environment import absolute_folders; \
  os.execvpe(sys.argv[1], sys.argv[1:], os.environ | absolute_folders())
# Settings of pip and Python that would install into, or import from, another place than .venv.
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN PIP_NO_DEPS PIP_REQUIRE_VIRTUALENV
unexport PIP_REQUIREMENT PIP_EDITABLE PIP_IGNORE_INSTALLED PIP_REQUIRE_HASHES
unexport PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONUSERBASE PYTHONOPTIMIZE

.DEFAULT_GOAL := book
.PHONY: edition book test test-quick lab serve clean lock donor
# A step that fails leaves no file that looks finished.
.DELETE_ON_ERROR:

book: $(LOCKED) donor
	@$(BIN)/dernet run --profile "$(PROFILE)"

test: $(LOCKED) donor
	@tools/system.sh chromium dciodvfy dcmtk gdcm orthanc
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal

test-quick: $(LOCKED) donor
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal -m "not slow"

lab: $(LOCKED) donor
	@$(BIN)/python -c "$$ABSOLUTE" $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

serve: $(LOCKED)
	@$(BIN)/dernet serve --profile "$(PROFILE)"

edition: $(LOCKED) donor
	@$(BIN)/dernet edition

clean:
	rm -rf runs _build .pytest_cache .ruff_cache .hypothesis

lock: $(LOCKED)
	@$(BIN)/uv --no-config pip compile pyproject.toml --universal --all-extras --generate-hashes \
	  --no-header --quiet --output-file requirements.lock

$(LOCKED):
	@PYTHON="$(PYTHON)" tools/system.sh venv opencv
	@$(PYTHON) -c "import sys; (3, 11) <= sys.version_info < (3, 13) or sys.exit('Python 3.11 or 3.12 is needed, not ' + sys.version.split()[0] + ': name one with make PYTHON=python3.11')"
	@echo "Setting up .venv from requirements.lock, once: about 5 minutes and 8 GB of disk …"
	@[ ! -e .venv ] || [ -e .venv/made-by-make ] || { echo "There is a .venv that this Makefile did not make: move or delete it." >&2; exit 1; }
	@rm -rf .venv
	@$(PYTHON) -m venv .venv && touch .venv/made-by-make
	@$(PIP) install --no-user --no-deps --require-hashes -r requirements.lock
	@$(PIP) install --no-user --no-deps --no-build-isolation --editable .
	@touch $@

# The command knows the folder. This test only saves its time, where the path needs no `~`.
donor: $(LOCKED)
	@[ -e "$${DERNET_DONOR:-.cache/donor}/mask.nii.gz" ] || $(BIN)/dernet donor
