# Needs make and Python >= 3.11 alone; everything else goes into .venv.
#
#   make demo     the whole way on the embedded corpus, on a CPU
#   make test     lint, format and tests
#   make lint     lint and format only
#   make clean    remove .venv, builds and caches (never runs/)
#
# PYTHON=python3.12 chooses the interpreter. CONSTRAINTS= (empty) leaves the choice of versions, such as torch's
# CUDA build, to pip.

VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
PYTEST_ARGS ?= -n 2 --dist loadfile

# The first interpreter that is new enough and can make virtual environments.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	"$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

# The stamp's name is made of what decides the content of .venv, so a second call has nothing to do.
STAMP := $(VENV)/installed-$(shell { cat pyproject.toml $(CONSTRAINTS); pwd; } | cksum | tr ' ' -)

.PHONY: setup demo test lint clean

setup: $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/affekt demo

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(STAMP):
	@test -n "$(PYTHON)" || { echo "affekt needs Python >= 3.11 with the modules venv and ensurepip (Debian and" \
		"Ubuntu: the package python3-venv); none is on the PATH. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "setting up $(VENV): a few minutes and 2 GB the first time"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[test]'
	@rm -f $(VENV)/installed-*
	@touch $@
