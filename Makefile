# What 4-bit quantization costs and saves. `make` prints this help; see README.md.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

STUDY ?= smollm2-135m
ALL_CONFIGS := $(filter-out study,$(basename $(notdir $(wildcard params/$(STUDY)/*.yaml))))
CONFIGS ?= $(ALL_CONFIGS)
# RESULTS=executed/reference/MACHINE/STUDY renders report and figures from a committed run.
OUT := $(or $(RESULTS),executed/$(STUDY))
FOLDER := $(if $(RESULTS),-p folder $(RESULTS))

# PYTHON=python3 uses an environment that is already there; without it, .venv is made and kept up to date.
ifdef PYTHON
PY := $(PYTHON)
ENV :=
else
PY := .venv/bin/python
ENV := .venv/.ready
endif
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

# What each notebook's results depend on, beside the notebook and its parameter files (tests/test_makefile.py compares with the imports).
h = $(wildcard $(patsubst %,helpers/%.py,$(1)))
COMMON := $(call h,__init__ params results)
WEIGHTS := $(COMMON) $(call h,models methods compress calibration hub coqa memory)
EVALUATE := $(WEIGHTS) $(call h,evaluation dialogue slots static_slots answers) $(wildcard helpers/tasks/*.* helpers/tasks/dialogues/*)
BENCHMARK := $(WEIGHTS) $(call h,benchmark capacity decode device int8_limit roofline throughput timing weights codebooks)
FIDELITY := $(EVALUATE) $(call h,fidelity divergence weights codebooks noise sensitivity statistics)
ANALYSIS := $(COMMON) params/paper.yaml $(call h,analysis claims evidence statistics redraw) $(wildcard helpers/report*.py helpers/figures*.py helpers/diagrams.py)
STUDY_FILE := params/$(STUDY)/study.yaml
NB = $(PY) -m helpers.notebook

.PHONY: help
help: ## print this help
	@echo "make TARGET [STUDY=$(STUDY)] [CONFIGS=\"$(CONFIGS)\"] [PYTHON=python3] [-j 2]"; echo
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 20
	@echo; echo "studies: $(notdir $(patsubst %/,%,$(dir $(wildcard params/*/study.yaml))))"

# ---- environment ----

.PHONY: setup
setup: $(ENV) ## make .venv from the pinned requirements (METHODS=all: FP8, GPTQ, AWQ as well)

# Installing the method packages later makes "not run" configurations stale.
METHODS_READY := $(wildcard .venv/.methods)
ifeq ($(METHODS),all)
setup: $(if $(ENV),.venv/.methods)
endif

.venv/.methods: requirements-methods.txt .venv/.ready
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-methods.txt && touch $@

.venv/.ready: requirements.txt
	@python=; for p in python3 python3.13 python3.12 python3.11; do \
	  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then python=$$p; break; fi; done; \
	[ -n "$$python" ] || { echo "No Python 3.11, 3.12 or 3.13 found: install one, or name yours with make PYTHON=..." >&2; exit 1; }; \
	$$python -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$$python cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }; \
	echo "setting up .venv with $$($$python --version): some minutes, once"; \
	[ -x .venv/bin/python ] || $$python -m venv --clear .venv; \
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt && touch $@

# ---- the study ----

.PHONY: run-all measure again measure-again report figures check
run-all: check ## run the whole study: evaluate, benchmark, compare, report (what is fresh is not run again)
	@result=0; $(MAKE) -k --no-print-directory measure || result=$$?; \
	$(MAKE) -k --no-print-directory report figures || result=$$?; \
	[ $$result = 0 ] && echo "report: $(OUT)/report.html" || echo "not everything worked: see the lines with FAILED above, and make status"; exit $$result

again: check ## measure the hardware a second time, in new processes: the report then says how well times repeat
	@$(MAKE) -k --no-print-directory measure-again && $(MAKE) --no-print-directory report figures

check: $(ENV)
	@$(PY) -m helpers.params $(STUDY) $(CONFIGS)

# $(1) notebook  $(2) configuration  $(3) further prerequisites  $(4) folder of a second run
define CONFIGURATION_RULE
measure$(if $(4),-$(4)): $(OUT)/$(if $(4),$(4)/)$(2)/$(1).ipynb
$(OUT)/$(if $(4),$(4)/)$(2)/$(1).ipynb: notebooks/$(1).ipynb $(STUDY_FILE) params/$(STUDY)/$(2).yaml $(OUT)/00_setup.ipynb $(3) $(METHODS_READY)
	@$$(NB) run notebooks/$(1).ipynb $$@ -f $(STUDY_FILE) -f params/$(STUDY)/$(2).yaml $(if $(4),-p folder $(OUT)/$(4))
endef
# A study without dialogues measures hardware only.
HAS_DATA := $(shell grep -s '^data:' $(STUDY_FILE))
$(foreach c,$(CONFIGS),$(eval $(call CONFIGURATION_RULE,02_benchmark,$(c),$(BENCHMARK))))
$(foreach c,$(CONFIGS),$(eval $(call CONFIGURATION_RULE,02_benchmark,$(c),$(BENCHMARK),again)))
ifneq ($(HAS_DATA),)
$(foreach c,$(CONFIGS),$(eval $(call CONFIGURATION_RULE,01_evaluate,$(c),$(EVALUATE))))
$(foreach c,$(CONFIGS),$(eval $(call CONFIGURATION_RULE,03_fidelity,$(c),$(FIDELITY))))
endif

$(OUT)/00_setup.ipynb: notebooks/00_setup.ipynb $(STUDY_FILE) $(WEIGHTS) | $(ENV)
	@$(NB) run notebooks/00_setup.ipynb $@ -f $(STUDY_FILE)

RESULT_FILES = $(wildcard $(OUT)/setup.json $(OUT)/*/evaluation.json $(OUT)/*/benchmark.json $(OUT)/again/*/benchmark.json $(OUT)/*/fidelity.json $(OUT)/bench_eval.json)

report: $(OUT)/report.html ## render the report from the results that are there

$(OUT)/04_analysis.ipynb: notebooks/04_analysis.ipynb $(STUDY_FILE) $(ANALYSIS) $(RESULT_FILES) | $(ENV)
	@$(NB) run notebooks/04_analysis.ipynb $@ -f $(STUDY_FILE) $(FOLDER)

$(OUT)/report.html: $(OUT)/04_analysis.ipynb helpers/notebook.py
	@$(NB) render $< $@

figures: $(OUT)/05_figures.ipynb ## draw every figure as PNG and SVG under figures/STUDY

$(OUT)/05_figures.ipynb: notebooks/05_figures.ipynb $(STUDY_FILE) $(ANALYSIS) $(RESULT_FILES) $(OUT)/04_analysis.ipynb | $(ENV)
	@$(NB) run notebooks/05_figures.ipynb $@ -f $(STUDY_FILE) $(FOLDER)

.PHONY: status new-study
status: $(ENV) ## table of what is fresh, stale, failed or missing
	@$(NB) status $(STUDY) $(CONFIGS)

new-study: $(ENV) ## write params/STUDY for another model: make new-study MODEL=owner/name STUDY=my-study
	@$(PY) -m helpers.new_study "$(MODEL)" "$(STUDY)"

# ---- work on it ----

.PHONY: lab test lint clean readme bench-pipeline bench-eval bench-peer bench-statistics
lab: $(ENV) ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks/04_analysis.ipynb

test: $(ENV) ## run all tests (no GPU needed; a browser test wants chromium)
	$(PY) -m pytest -q tests

lint: $(ENV) ## check code and notebooks
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) tests/check_notebooks.py

readme: $(ENV) ## render what README.md says was found, from the committed runs
	@$(PY) -m helpers.report

bench-pipeline: $(ENV) ## time make run-all and make test, with peak memory, into executed/reference/
	$(PY) tests/bench_pipeline.py

bench-eval: $(ENV) ## hf-dialogue against stock lm-eval, side by side (LIMIT=dialogues)
	$(PY) tests/bench_eval.py --study $(STUDY) --limit $(or $(LIMIT),20) --configurations $(CONFIGS)

bench-peer: $(ENV) ## prefill and decode beside optimum-benchmark's (pip install optimum-benchmark==0.6.0)
	$(PY) tests/bench_peer.py --study $(STUDY)

bench-statistics: $(ENV) ## simulate the coverage of intervals and the level of tests
	$(PY) tests/bench_statistics.py

clean: ## delete this study's results and figures (not the cached weights, not executed/reference)
	@[ "$(STUDY)" != reference ] && rm -rf "$(OUT)" "figures/$(STUDY)"
