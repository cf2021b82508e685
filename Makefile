# make run        the text stages on a demonstration dataset, a trained model, and a second round with it
# make run-images the image stages on handwritten digits
# make run-llm    LLM clustering of requests, and a taxonomy of dialogues, with the provider that needs no LLM
# make test       the tests, without network or GPU
# make check      style, types and the order of imports
# make bench      the benchmarks, against their peers

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG := clustering.example.yaml
DEMO   := runs/demo

# The second round reads the trained model and writes beside the first.
ROUND2           := $(DEMO)/round2
ROUND2_SUPERVISE := supervise.model_name_or_path=$(DEMO)/metric_classifier/best supervise.output_dir=$(ROUND2)/supervised
ROUND2_PCA       := normalize_and_pca.input_dir=$(ROUND2)/supervised normalize_and_pca.output_dir=$(ROUND2)/pca
ROUND2_TRAIN     := train.input_dir=$(ROUND2)/pca train.centroids_out=$(ROUND2)/centroids.parquet \
                    train.model_out=$(ROUND2)/kmeans.joblib
ROUND2_PURITY    := purity_counter.shards_dir=$(ROUND2)/pca purity_counter.centroids_path=$(ROUND2)/centroids.parquet

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
	$(BIN)/python train_metric_classifier.py --config metric_classifier_training.example.yaml
	$(BIN)/python cluster_supervise.py --config $(CONFIG) $(ROUND2_SUPERVISE)
	$(BIN)/python cluster_normalize_and_pca.py --config $(CONFIG) $(ROUND2_PCA)
	$(BIN)/python cluster_train_clusters.py --config $(CONFIG) $(ROUND2_TRAIN)
	$(BIN)/python cluster_train_clusters.py --config $(CONFIG) $(ROUND2_TRAIN) train.run_mode=predict
	$(BIN)/python cluster_purity_counter.py --config $(CONFIG) $(ROUND2_PURITY)
	@echo
	@$(BIN)/python demo/compare_rounds.py --before $(DEMO)/pca --after $(ROUND2)/pca
	@echo
	@echo "Done. Look at:"
	@echo "  $(DEMO)/purity_report.html          clusters, their purity, example texts, a map"
	@echo "  $(ROUND2)/purity_report.html   the same after one round of the loop"
	@echo "  $(DEMO)/dataset/                    the dataset with pseudo-labels and masks"
	@echo "  $(DEMO)/metric_classifier/          the trained model and its curves"
	@echo "  $(CONFIG)             change a key, start a stage again"

run-images: $(VENV)/.run
	$(BIN)/python demo/digit_images.py --out runs/digits
	$(BIN)/python image_cluster.py --config runs/digits/config.yaml --yes

INPUT ?=
run-llm: $(VENV)/.run
	$(if $(INPUT),,$(BIN)/python demo/support_requests.py --out $(DEMO)/llm_requests.parquet --rows 1000)
	$(BIN)/python llm_cluster.py --config $(CONFIG) --input $(or $(INPUT),$(DEMO)/llm_requests.parquet) \
	    llm.provider=extractive llm_cluster.output_dir=runs/llm/$(basename $(notdir $(or $(INPUT),sample))) \
	    $(if $(INPUT),,llm_cluster.label_column=true_intent)
	$(if $(INPUT),,$(BIN)/python demo/dialogues.py --out $(DEMO)/dialogues.jsonl --rows 400)
	$(if $(INPUT),,$(BIN)/python llm_cluster.py --config $(CONFIG) llm_cluster.mode=clio llm.provider=extractive \
	    clio.label_column=true_intent)

# Files are shared out to worker processes of one thread each; WORKERS=0 runs them all in one process.
WORKERS ?= 2
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(VENV)/.dev
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf runs .cache
