# Viaduct's entry points. `make` alone says what there is.
#
# Everything Python lives in $(VENV), everything Rust in target/; stamps in $(VENV)/stamps remember what was done for which
# inputs, so that a second run does nothing again. VENV=DIR and PYTHON=python3.12 may be given on the command line.

VENV ?= .venv
STAMPS := $(VENV)/stamps
LOGS := build/logs
BIN := $(VENV)/bin
RUST := . $(VENV)/rust.env &&
LINT := $(RUST) . $(VENV)/lint.env &&
RUST_SOURCES := $(shell find crates -name '*.rs' -o -name 'Cargo.toml') Cargo.toml Cargo.lock pyproject.toml
export PYO3_PYTHON := $(abspath $(BIN)/python)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test dev lint unit interop lab lab-again lab-shell rust-test rust-peers bench bench-quick bench-machine bench-reliability bench-instructions soak soak-short fuzz fuzz-short docs-check format clean distclean

help: ## what there is to make
	@echo 'Viaduct: a user-space virtual switch and hypervisor. See README.md.'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-26s %s\n", $$1, $$2 }'
	@echo
	@echo 'After `make demo` or `make dev`, the command is $(BIN)/viaduct. `pip install .` works as well.'

demo: $(STAMPS)/core ## two guests in this process talk over the switch; needs no package of the system
	@$(BIN)/viaduct demo $(DEMO)

dev: $(STAMPS)/core $(STAMPS)/tools ## the package and everything for working on it, in .venv

test: dev $(VENV)/lint.env ## every check: lint, Rust tests, Python tests, tests with QEMU, DPDK, Open vSwitch, and in the lab
	@setup/debian_packages.sh
	@setup/checks.sh $(LOGS) 'lint=$(MAKE) --no-print-directory lint' 'rust=$(MAKE) --no-print-directory rust-test' \
		'rust-peers=$(MAKE) --no-print-directory rust-peers' \
		'instructions=$(MAKE) --no-print-directory bench-instructions' \
		'unit=$(MAKE) --no-print-directory unit' 'interop=$(MAKE) --no-print-directory interop' \
		'lab=$(MAKE) --no-print-directory lab-again' \
		'soak=$(MAKE) --no-print-directory soak-short' \
		'fuzz=$(MAKE) --no-print-directory fuzz-short'

lint: dev $(VENV)/lint.env ## formatting, clippy, ruff, mypy, and the stubs against the built module
	$(LINT) cargo fmt --all --check
	$(LINT) cargo clippy --quiet --workspace --all-targets -- -D warnings
	$(LINT) cargo fmt --manifest-path fuzz/Cargo.toml --check
	$(LINT) cargo clippy --quiet --manifest-path fuzz/Cargo.toml --locked --all-targets --target-dir build/fuzz/lint -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest viaduct._core --allowlist setup/stubtest.allow
	$(BIN)/python setup/house_rules.py
	$(BIN)/python setup/docs_check.py

rust-test: $(VENV)/rust.env ## the crates' own tests
	$(RUST) if cargo nextest --version >/dev/null 2>&1; \
	then cargo nextest run --workspace --no-tests pass && cargo test --quiet --workspace --doc; \
	else cargo test --quiet --workspace; fi

rust-peers: $(VENV)/rust.env ## those of them that need tshark, or root and huge pages
	$(RUST) cargo test --quiet --package viaduct-switch --test offload -- --ignored
	$(RUST) if [ "$$(id -u)" = 0 ]; then cargo test --quiet --package viaduct-memory --test huge_pages -- --ignored; \
	else echo 'huge pages: not tested, because only root can reserve them'; fi

unit: dev ## Python tests that need nothing but this package
	$(BIN)/pytest tests/unit $(PYTEST)

interop: dev ## tests with peers nobody here wrote: QEMU, DPDK, Open vSwitch
	$(BIN)/pytest tests/interop $(PYTEST)

lab: dev ## tests that need hardware virtualization, vhost-net, an IOMMU: in an emulated machine that has them (docs/lab.md)
	$(BIN)/pytest tests/lab $(PYTEST)

lab-again: dev ## the same as a part of `make test`: what failed runs once more, in another lab (docs/lab.md)
	$(BIN)/pytest tests/lab $(PYTEST) || { echo 'lab: what failed runs once more, in another lab (docs/lab.md)'; \
		$(BIN)/pytest tests/lab --last-failed $(PYTEST); }

lab-shell: dev ## a shell in that machine
	@PYTHONPATH=tests $(BIN)/python -m lab shell

soak: dev ## kills, upgrades, churn, storms: the full counts, for hours (docs/reliability.md); PYTEST='-k killed' for some
	@setup/debian_packages.sh
	$(BIN)/pytest tests/soak --soak -v $(PYTEST)

soak-short: dev ## the same tests with few rounds and always the same seed, as part of `make test`
	VIADUCT_SOAK_SEED=$${VIADUCT_SOAK_SEED:-1} $(BIN)/pytest tests/soak $(PYTEST)

fuzz: $(VENV)/rust.env ## the fuzz targets, ten minutes each; FUZZ='--seconds 3600 --jobs 4 forward' for others (fuzz/README.md)
	@setup/debian_packages.sh
	$(RUST) $(BIN)/python fuzz/run.py --seconds 600 $(FUZZ)

fuzz-short: $(VENV)/rust.env ## the same for half a minute each, as part of `make test`
	$(RUST) $(BIN)/python fuzz/run.py --seconds 30 --jobs 2 --seed 1

bench: dev $(STAMPS)/bench ## testpmd, Open vSwitch with DPDK and Viaduct side by side: a table and a plot
	@setup/debian_packages.sh
	$(RUST) $(BIN)/python -m bench
	$(BIN)/python -m bench.machine

bench-quick: dev $(STAMPS)/bench ## the same, with less of everything
	@setup/debian_packages.sh
	$(RUST) $(BIN)/python -m bench --quick

bench-machine: dev ## machines of ours and QEMU's microvm side by side in the lab: start, memory, exits, disk, network
	$(BIN)/python -m bench.machine $(BENCH)

bench-reliability: dev $(STAMPS)/bench ## Viaduct and Open vSwitch killed, their guests killed, a storm: a table in docs/reliability.md
	@setup/debian_packages.sh
	$(RUST) $(BIN)/python -m bench.reliability

bench-instructions: dev $(VENV)/lint.env ## instructions per packet, compared with those kept in bench/results; UPDATE=1 keeps new ones
	$(LINT) $(BIN)/python -m bench.instructions $(if $(UPDATE),--update)

docs-check: dev ## every link and command in the documentation
	$(BIN)/python setup/docs_check.py

format: dev $(VENV)/lint.env ## put the sources into their one format
	$(LINT) cargo fmt --all
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

clean: ## remove what was built
	rm -rf target build dist python/viaduct/_core*.so $(STAMPS)/core .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## and the environment
	rm -rf $(VENV)

# The environment, the toolchain, the extension module, the tools: each once for each state of its inputs.

$(BIN)/python: setup/venv.sh
	@setup/venv.sh $(VENV)
	@touch $@

$(STAMPS)/maturin: $(BIN)/python pyproject.toml
	@mkdir -p $(STAMPS)
	@$(BIN)/pip install --quiet "$$(sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml)"
	@touch $@

$(VENV)/rust.env: setup/rust.sh | $(STAMPS)/maturin
	@setup/rust.sh $(VENV) >$@.new && mv $@.new $@

$(STAMPS)/core: $(RUST_SOURCES) $(VENV)/rust.env $(STAMPS)/maturin
	@echo 'setup: building the extension module (the first time takes a minute or two)'
	@$(RUST) VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release >$(STAMPS)/build.log 2>&1 || \
		{ cat $(STAMPS)/build.log; exit 1; }
	@touch $@

# The optional dependencies of one name in pyproject.toml, without building the package for them.
install-extra = $(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*project["optional-dependencies"]["$(1)"], sep="\n")' >$(STAMPS)/$(1).txt && \
	$(BIN)/pip install --quiet -r $(STAMPS)/$(1).txt

$(STAMPS)/tools: pyproject.toml $(STAMPS)/maturin
	@$(call install-extra,dev)
	@touch $@

$(STAMPS)/bench: pyproject.toml $(STAMPS)/maturin
	@$(call install-extra,bench)
	@touch $@

$(VENV)/lint.env: setup/lint_toolchain.sh $(VENV)/rust.env
	@$(RUST) setup/lint_toolchain.sh >$@.new && mv $@.new $@
