# Every target works on a fresh checkout: what it needs goes into $(VENV), again whenever a declared version changes.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
MINUTES ?= 8
COUNT ?= 300
SEED ?= 0
K ?= fp32 and not compile

BIN := $(VENV)/bin

# Environments are installed without bytecode. Where none may be written either, each process that a test starts compiles
# torch's modules again, which took a fifth of the tests' time.
BYTECODE := env -u PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-oldest test-versions fuzz soak mutants gpu bench lint docs clean
.NOTPARALLEL:

demo: $(VENV)/.demo-installed
	$(BIN)/fastops demo

test: $(VENV)/.dev-installed
	$(BYTECODE) $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8

# What numpy and torch multiply and sum up with on an older processor rounds otherwise than on a new one. Any x86-64
# processor that they run on has the instructions of these; those of Haswell or Sandybridge would be too new for some.
OLDEST := OPENBLAS_CORETYPE=Nehalem MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41

test-oldest: $(VENV)/.dev-installed
	$(BYTECODE) $(OLDEST) $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 tests/interpreter

# What depends most on the versions of torch, Triton and Python, about a third of all tests: with each pair of versions
# that is supported, or with that of TORCH alone.
SOME ?= $(patsubst %,tests/%.py,interpreter/test_add_relu_kernels interpreter/test_bce_kernels \
	interpreter/test_linear_kernels test_autograd test_backend_selection test_compile test_compile_backend \
	test_compile_neighbours test_dispatch test_errors test_export test_func test_functional test_launch \
	test_linear_cross_entropy test_offline_compile test_private test_strict test_swap test_swap_classes \
	test_swap_statements test_swap_threads test_swap_transforms)

test-versions:
	$(BYTECODE) WORKERS=$(WORKERS) .ci/versions "$(TORCH)" $(SOME)

# With the torch that $(PYTHON) has, and nothing installed: a machine with a GPU comes with its own, and may have no network.
gpu:
	$(PYTHON) -m fastops qualify --minutes $(MINUTES) --json qualify.json --html qualify.html --table kernels/measured

fuzz: $(VENV)/.dev-installed
	$(BYTECODE) $(BIN)/python -m pytest --numprocesses $(WORKERS) --hypothesis-profile=deep \
		tests/test_fuzz.py tests/test_swap_random.py tests/test_swap_stateful.py

soak: $(VENV)/.dev-installed
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

mutants: $(VENV)/.dev-installed
	$(BIN)/python tests/mutants.py --count $(COUNT) --seed $(SEED)

bench: $(VENV)/.dev-installed
	$(BIN)/python -m pytest bench -k "$(K)"

lint: $(VENV)/.dev-installed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pre-commit validate-config

docs: $(VENV)/.dev-installed
	$(BIN)/sphinx-build --fail-on-warning --quiet docs docs/_build/html

clean:
	if [ -e $(VENV)/.made-by-make ]; then rm -rf $(VENV); fi
	rm -rf build dist torch_fastops.egg-info docs/_build curves.png qualify.json qualify.html
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastops kernels tests bench docs -name __pycache__ -prune -exec rm -rf {} +

# Compiling every module of every dependency takes longer than compiling, at first import, those that are used.
define install
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[$(1)]"
	@touch $@
endef

# The demo needs less than development does, so that a first look is quick.
$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(VENV)/.made-by-make
	$(call install,demo)

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/.made-by-make
	$(call install,dev)
	@touch $(VENV)/.demo-installed

# The mark keeps `make` away from a virtual environment that somebody else made.
$(VENV)/.made-by-make:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastops needs Python 3.10 or newer and $(PYTHON) \
	is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@if [ -e $(VENV) ]; then echo "$(VENV) was not made by make. Name another folder: make VENV=.venv-make"; exit 1; fi >&2
	@mkdir $(VENV) && touch $@
