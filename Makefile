# make run        the six text stages on a demonstration dataset, from nothing
# make run-images the image stages on handwritten digits
# make run-llm    LLM clustering of requests, with the provider that needs no LLM
# make test       the tests, without network or GPU
# make check      style, types and the order of imports
# make bench      the benchmarks, against their peers

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG := clustering.example.yaml
DEMO   := runs/demo

.PHONY: run run-images run-llm test check bench clean
.DEFAULT_GOAL := run

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.dev: requirements_dev.txt $(VENV)/.run
	$(BIN)/python -m pip install -q -r requirements_dev.txt
	touch $@

run: $(VENV)/.run
	$(BIN)/python demo/support_requests.py --out $(DEMO)/requests.parquet
	$(BIN)/python cluster_supervise.py --config $(CONFIG)
	$(BIN)/python cluster_normalize_and_pca.py --config $(CONFIG)
	$(BIN)/python cluster_train_clusters.py --config $(CONFIG)
	$(BIN)/python cluster_train_clusters.py --config $(CONFIG) train.run_mode=predict
	$(BIN)/python cluster_purity_counter.py --config $(CONFIG)
	$(BIN)/python cluster_update_dataset.py --config $(CONFIG)
	@echo
	@echo "Done. Look at:"
	@echo "  $(DEMO)/purity_report.html   clusters, their purity, example texts, a map"
	@echo "  $(DEMO)/dataset/             the dataset with pseudo-labels and masks, for the trainer"
	@echo "  $(CONFIG)      change a key, start a stage again"

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(VENV)/.dev
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf runs .cache
