# `make demo` makes a video, `make test` runs every check. Needs Python 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Three processes for two cores, because tests wait for a third of their time; each takes its share
# in the order of the files, and what is left of another's.
PYTEST := $(BIN)/pytest -n 3 --dist worksteal --durations=20
# The same of those that CI runs two at a time.
PYTEST_BESIDE := $(BIN)/pytest -n 2 --dist worksteal --durations=20

STUDIO_VENV := .venv-studio
SDK2_VENV := .venv-sdk2

.PHONY: demo demo-duet studio test lint types unit slow talks packages browser image sdk2 lock format clean

demo: $(VENV)/ready
	$(BIN)/python -m demo

# Two people in one picture, who speak in turn.
demo-duet: $(VENV)/ready
	$(BIN)/python -m demo --duet

# A page in the browser, with an endpoint of its own on this machine.
studio: $(VENV)/ready $(STUDIO_VENV)/ready
	$(STUDIO_VENV)/bin/python -m studio

test: $(VENV)/ready # the quick checks beside the tests
	$(MAKE) --no-print-directory --jobs=2 lint types unit

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry .
	$(BIN)/hadolint Dockerfile

types: $(VENV)/ready
	$(BIN)/mypy

# With COVERAGE=1, as in CI, lines and branches are counted, which takes a third longer.
unit: $(VENV)/ready
	$(PYTEST) $(if $(COVERAGE),--cov --cov-report=term:skip-covered)

# The longest cases: the demo model speaks, one has the published width (10 GB), processes are killed
# in mid-job.
slow: $(VENV)/ready
	$(PYTEST_BESIDE) -m "slow or large" tests/demo tests # the longest of them first

# The demo model on more faces and voices: for a new demo model.
talks: $(VENV)/ready
	$(PYTEST) -m talks

# The import guard against real broken packages, which are fetched.
packages: $(VENV)/ready
	$(PYTEST_BESIDE) -m packages

# The studio and the videos in headless Chromium, which has to be installed.
browser: $(VENV)/ready $(STUDIO_VENV)/ready
	$(PYTEST_BESIDE) -m browser

# Every command of the Dockerfile, in a fresh root: needs root's rights and debootstrap.
image: $(VENV)/ready
	$(BIN)/pytest -m image

# What touches RunPod's SDK, against its next version; test_signing_key is a whole worker with its job.
SDK2_TESTS := tests/service/test_once.py tests/service/test_serve.py tests/service/test_control_plane.py \
	tests/service/test_outages.py tests/local_endpoint/test_libraries.py tests/local_endpoint/test_workers.py \
	tests/security/test_redaction.py tests/security/test_signing_key.py
sdk2: $(SDK2_VENV)/ready
	$(SDK2_VENV)/bin/python -m pytest -n 2 --dist loadfile $(SDK2_TESTS)

# The packages of the image, each with its hash. After a change of pyproject.toml or constraints.txt.
LOCK := uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-annotate \
	--custom-compile-command "make lock"
lock: $(VENV)/ready
	$(BIN)/$(LOCK) --constraint constraints.txt --extra worker --extra gpu --output-file builder/requirements.txt pyproject.toml
	echo cyclonedx-bom | $(BIN)/$(LOCK) --output-file builder/sbom-requirements.txt -

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "Python 3.11 or 3.12 is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# An environment of its own: the page's packages and the worker's do not fit together, and the page
# needs none of the worker's.
$(STUDIO_VENV)/ready: pyproject.toml studio/constraints.txt
	$(PYTHON) -m venv $(STUDIO_VENV)
	$(STUDIO_VENV)/bin/pip install --quiet --constraint studio/constraints.txt --editable '.[studio]'
	touch $@

# Its own packages come first, then those of $(VENV), so that torch lies on the disk once.
$(SDK2_VENV)/ready: $(VENV)/ready
	rm -rf $(SDK2_VENV)
	$(BIN)/python -m venv --without-pip $(SDK2_VENV)
	site=$$($(SDK2_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])') && \
	$(BIN)/pip install --quiet --no-deps --target $$site runpod==2.0.0rc2 cloudpickle==3.1.2 && \
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$site/shared.pth
	$(SDK2_VENV)/bin/python -c 'import runpod; assert runpod.__version__ == "2.0.0rc2", runpod'
	touch $@

clean:
	rm -rf $(VENV) $(STUDIO_VENV) $(SDK2_VENV) .cache out
