# Every target makes the virtual environment it needs, and installs again only when the requirements changed.

# The Python that .venv is made with: PYTHON if given, else what .venv has already, else the first that is new enough.
CANDIDATES := $(or $(PYTHON),.venv/bin/python python3.11 python3.12 python3.13 python3.14 python3)
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
FOUND := $(shell for python in $(CANDIDATES); do "$$python" $(NEW_ENOUGH) && echo "$$python" && break; done)
NONE := PiperJAX needs Python 3.11 or newer, and none was found ($(CANDIDATES)); install one, or name it: \
	make train PYTHON=/path/to/python3.12

INSTALL = @$(if $(FOUND),"$(FOUND)" launch/install.py,echo "$(NONE)" >&2; exit 2;)
RUN = .venv/bin/python
# Processes that share the tests; 0 runs them in one, which reads better in a debugger. Each begins with a half of its
# own and takes from the other when done, so that tests of one file mostly share what they compiled.
WORKERS ?= 2

.PHONY: help install train test test-all lint format clean

help:
	@echo "make train [ARGS='--model small --devices 8'] [EXTRA=cuda]   train; again to resume; EXTRA=rocm for AMD"
	@echo "make install [EXTRA=cuda]                                    only what train needs, for launch/*.sbatch"
	@echo "make test                                                    the tests, but for the slow ones"
	@echo "make test-all                                                every test"
	@echo "make lint                                                    style, names, import directions"
	@echo "make format                                                  lay the code out as lint wants it"
	@echo "make clean                                                   remove .venv and caches; runs/ stays"
	@echo "PYTHON=python3.12 chooses the Python, 3.11 or newer"

train:
	$(INSTALL) $(EXTRA)
	@$(RUN) train.py $(ARGS)

install:
	$(INSTALL) $(EXTRA)

test:
	$(INSTALL) dev $(EXTRA)
	@$(RUN) -m pytest -q -m "not slow" -n $(WORKERS) --dist worksteal $(ARGS)

test-all:
	$(INSTALL) dev $(EXTRA)
	@$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

lint:
	$(INSTALL) dev $(EXTRA)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format:
	$(INSTALL) dev $(EXTRA)
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
