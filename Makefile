# What 4-bit quantization costs and saves. `make` prints this help; see README.md.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

STUDY ?= $(or $(notdir $(RESULTS:%/=%)),smollm2-135m)
# What starts a notebook, such as RUN="srun --gpus=1"; PROFILE=slurm sets it (params/slurm.mk), make -j then schedules.
RUN ?=
ifdef PROFILE
include params/$(notdir $(PROFILE)).mk
endif
# Studies and configurations are names of folders and files, and reach the shell: letters, digits, dots, hyphens,
# underscores.
LETTERS := a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z
DIGITS := 0 1 2 3 4 5 6 7 8 9
without = $(if $(1),$(call without,$(wordlist 2,99,$(1)),$(subst $(firstword $(1)),,$(2))),$(2))
not_names = $(filter .% -%,$(1))$(call without,$(LETTERS) $(DIGITS) . - _,$(strip $(subst $(space),,$(1))))
empty :=
space := $(empty) $(empty)
ifneq ($(words $(STUDY))$(call not_names,$(STUDY))$(filter reference,$(STUDY)),1)
$(error STUDY='$(STUDY)' is not the name of a study: give one folder of params/, such as STUDY=smollm2-135m)
endif
STUDY_FILE := params/$(STUDY)/study.yaml
PARAMETER_FILES := $(wildcard params/formats/*.yaml params/$(STUDY)/*.yaml)
UNFIT := $(filter-out %.yaml,$(PARAMETER_FILES))$(call not_names,$(basename $(notdir $(PARAMETER_FILES))))
ifneq ($(UNFIT),)
$(error params/formats or params/$(STUDY) has a file whose name is not letters, digits, dots, hyphens and \
  underscores: rename it)
endif
key = $(shell sed -n 's/^ *$(1): *\[\{0,1\}\([^]\#]*\).*/\1/p' $(STUDY_FILE) 2>/dev/null | head -n 1)
# A study has the formats that it names (none named: all), and its own files.
named := $(shell awk '/^formats:/{f=1; sub(/^formats:/,"")} f && /^[a-z]/{exit} \
  f{gsub(/\#.*|[][,]/," "); sub(/^ *- /," "); print}' $(STUDY_FILE) 2>/dev/null)
FORMATS := $(or $(named),$(basename $(notdir $(wildcard params/formats/*.yaml))))
ALL_CONFIGS := $(sort $(FORMATS) $(filter-out study,$(basename $(notdir $(wildcard params/$(STUDY)/*.yaml)))))
CONFIGS ?= $(ALL_CONFIGS)
ifneq ($(call not_names,$(CONFIGS)),)
$(error CONFIGS='$(CONFIGS)' holds something else than names: give some of $(ALL_CONFIGS))
endif
# A time is the median of so many processes, each with a notebook of its own: one says nothing about the next.
PROCESSES ?= $(or $(call key,processes),$(if $(wildcard /dev/nvidia[0-9]* /dev/dxg),3,1))
# RESULTS=executed/reference/MACHINE/STUDY renders report and figures from a committed run.
ANY := $(if $(RESULTS),$(wildcard $(RESULTS)/setup.json $(RESULTS)/*/*.json),none is asked for)
ifneq ($(call not_names,$(subst /,,$(RESULTS)))$(findstring ..,$(RESULTS))$(word 2,$(RESULTS))$(if $(ANY),,none),)
$(error RESULTS='$(RESULTS)' is not a folder of results: give one under executed/, such as \
  executed/reference/hopper/smollm2-135m)
endif
OUT := $(or $(RESULTS),executed/$(STUDY))
MEASURED = $(sort $(notdir $(filter-out %.failed.ipynb,$(wildcard $(OUT)/*/02_benchmark*.ipynb))))
FOLDER := $(if $(RESULTS),-p folder $(RESULTS))
# What only reads results has no rules to make them: nothing may measure committed results again, nor a report what
# failed.
READING := report report-pdf samples llm-comparator gate compare figures
MEASURING := $(if $(RESULTS),,$(filter-out $(READING),$(or $(MAKECMDGOALS),help)))

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

# A notebook's results depend on its folder of helpers, on setup/, params and results, beside the notebook and its
# parameter files.
folder = $(wildcard $(patsubst %,helpers/%/*.py,$(1)))
COMMON := helpers/params.py $(wildcard helpers/schema*.py) helpers/results.py helpers/provenance.py $(call folder,setup)
EVALUATE := $(COMMON) $(call folder,evaluate) $(wildcard helpers/tasks/*.* helpers/tasks/dialogues/*)
BENCHMARK := $(COMMON) $(call folder,benchmark)
FIDELITY := $(COMMON) helpers/statistics.py helpers/ranks.py $(call folder,fidelity) \
  $(wildcard helpers/tasks/dialogues/*)
ANALYSIS := helpers/params.py $(wildcard helpers/schema*.py) helpers/results.py helpers/provenance.py \
  helpers/statistics.py params/paper.yaml $(call folder,analysis)
NB = $(PY) -m helpers.notebook

.PHONY: help
help: ## print this help
	@echo "make TARGET [STUDY=$(STUDY)] [CONFIGS=\"$(CONFIGS)\"] [PYTHON=python3] [-j 2]"; echo
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 20
	@echo; echo "studies: $(notdir $(patsubst %/,%,$(dir $(wildcard params/*/study.yaml))))"

# ---- environment ----

.PHONY: setup
setup: $(ENV) ## make .venv from the pinned requirements (METHODS=all: FP8, GPTQ, AWQ; TORCH_INDEX=URL: PyTorch from it)

# Installing the method packages later makes "not run" configurations stale.
METHODS_READY := $(wildcard .venv/.methods)
ifeq ($(METHODS),all)
setup: $(if $(ENV),.venv/.methods)
endif

# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch from there: no CUDA libraries.
PIP = .venv/bin/python -m pip install --disable-pip-version-check -c .requirements-lock.txt \
  $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
PIP_STEPS := /^ *(Downloading|Installing|Successfully|Building)/
PIP_LINES = sed -u -n -E '$(PIP_STEPS)s/^(.{110}).*/\1 .../;$(PIP_STEPS)p'

.venv/.methods: requirements-methods.txt .requirements-lock.txt .venv/.ready
	@$(PIP) -r requirements.txt -r requirements-methods.txt | $(PIP_LINES) && touch $@

.venv/.ready: requirements.txt .requirements-lock.txt
	@python=; for p in python3 python3.13 python3.12 python3.11; do \
	  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    python=$$p; break; fi; done; \
	[ -n "$$python" ] || \
	  { echo "No Python 3.11, 3.12 or 3.13 found: install one, or name yours with make PYTHON=..." >&2; exit 1; }; \
	$$python -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$$python cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install" \
	    "python3-venv)." >&2; exit 1; }; \
	echo "setting up .venv with $$($$python --version): some minutes, once"; \
	[ -x .venv/bin/python ] || $$python -m venv --clear .venv; \
	$(PIP) -r requirements.txt | $(PIP_LINES) && touch $@

# ---- the study ----

.PHONY: run-all measure again report report-pdf samples llm-comparator gate compare figures check
run-all: check ## run the whole study: evaluate, benchmark, compare, report (what is fresh is not run again)
	@result=0; $(MAKE) -k --no-print-directory measure || result=$$?; \
	$(MAKE) -k --no-print-directory report figures || result=$$?; \
	[ $$result = 0 ] && echo "report: $(OUT)/report.html" || \
	echo "not everything worked: the reasons are above, make status STUDY=$(STUDY) shows what is missing"; exit $$result

again: ## measure the hardware in one more process
	@$(MAKE) --no-print-directory run-all PROCESSES=$(words $(MEASURED) further)

check: $(ENV)
	@$(NB) check "$(STUDY)" $(CONFIGS)

# $(1) target notebook  $(2) notebook  $(3) configuration  $(4) its result  $(5) prerequisites  $(6) more parameters
# $(7) group
# Whoever writes a target does so in one move: nothing is half-made, so Make deletes nothing when it is interrupted.
# The result is a target as well: whoever deletes it gets it made again. Weights that study.yaml alone determines are
# the same when 00_setup runs again, so what was measured stays fresh; a folder's or a hub's may have changed.
SETUP := $(if $(shell grep -sE '^ *source: *(package|random)( |$$)' $(STUDY_FILE)),| )$(OUT)/setup.json \
  $(OUT)/00_setup.ipynb
define CONFIGURATION_RULE
.PRECIOUS $(if $(7),$(7),hardware): $(OUT)/$(3)/$(1).ipynb $(OUT)/$(3)/$(4).json
$(OUT)/$(3)/$(1).ipynb $(OUT)/$(3)/$(4).json &: notebooks/$(2).ipynb $(STUDY_FILE) $(call files,$(3)) $(5) \
  $(METHODS_READY) $(SETUP)
	@$$(RUN) $$(NB) run notebooks/$(2).ipynb "$(OUT)/$(3)/$(1).ipynb" -f $(STUDY_FILE) \
	  $(patsubst %,-f %,$(call files,$(3))) $(6)
endef
files = $(wildcard params/formats/$(1).yaml params/$(STUDY)/$(1).yaml)
.PHONY: hardware accuracy
measure: hardware accuracy
hardware: ## run 02 alone, in PROCESSES processes
accuracy: ## run 01 and 03 alone
# A study without dialogues measures hardware only.
HAS_DATA := $(shell grep -s '^data:' $(STUDY_FILE))
FURTHER := $(wordlist 2,$(PROCESSES),1 2 3 4 5 6 7 8 9)
ifneq ($(MEASURING),)
$(foreach c,$(CONFIGS),$(eval $(call CONFIGURATION_RULE,02_benchmark,02_benchmark,$(c),benchmark,$(BENCHMARK))))
$(foreach n,$(FURTHER),$(foreach c,$(CONFIGS),$(eval \
  $(call CONFIGURATION_RULE,02_benchmark_$(n),02_benchmark,$(c),benchmark_$(n),$(BENCHMARK),-p process $(n)))))
ifneq ($(HAS_DATA),)
$(foreach c,$(CONFIGS),$(eval $(call CONFIGURATION_RULE,01_evaluate,01_evaluate,$(c),evaluation,$(EVALUATE),,accuracy)))
$(foreach c,$(CONFIGS),$(eval $(call CONFIGURATION_RULE,03_fidelity,03_fidelity,$(c),fidelity,$(FIDELITY),,accuracy)))
.PRECIOUS accuracy: $(OUT)/03_weights.ipynb $(OUT)/weights.json
$(OUT)/03_weights.ipynb $(OUT)/weights.json &: notebooks/03_weights.ipynb $(STUDY_FILE) $(FIDELITY) $(EVALUATE) $(SETUP)
	@$(RUN) $(NB) run notebooks/03_weights.ipynb "$(OUT)/03_weights.ipynb" -f $(STUDY_FILE)
endif

.PRECIOUS measure: $(OUT)/00_setup.ipynb $(OUT)/setup.json
$(OUT)/00_setup.ipynb $(OUT)/setup.json &: notebooks/00_setup.ipynb $(STUDY_FILE) $(COMMON) | $(ENV)
	@$(RUN) $(NB) run notebooks/00_setup.ipynb "$(OUT)/00_setup.ipynb" -f $(STUDY_FILE)
endif

RESULT_FILES = $(wildcard $(addprefix $(OUT)/,setup.json weights.json bench_eval.json */evaluation.json \
  */benchmark*.json */fidelity.json))

ANSWERS = $(if $(wildcard $(OUT)/*/evaluation.json),$(OUT)/samples.html)
report: $(OUT)/report.html $(ANSWERS) ## render the report, and the answers that it leads to

$(OUT)/04_analysis.ipynb: notebooks/04_analysis.ipynb $(STUDY_FILE) $(ANALYSIS) $(RESULT_FILES) | $(ENV)
	@$(RUN) $(NB) run notebooks/04_analysis.ipynb $@ -f $(STUDY_FILE) $(FOLDER)

$(OUT)/report.html: $(OUT)/04_analysis.ipynb helpers/notebook.py $(wildcard notebooks/template/*)
	@$(NB) render $< $@

BROWSERS := chromium chromium-browser google-chrome chrome
CHROMIUM ?= $(firstword $(foreach name,$(BROWSERS),$(shell command -v $(name))) chromium)
# A printed link to a file beside the page would hold this machine's path.
report-pdf: $(OUT)/report.html ## print the report as a PDF (needs Chromium or Chrome)
	@folder=$$(mktemp -d); trap "rm -r $$folder" EXIT; \
	sed -E 's/ href="[^"#:]+\.(ipynb|html)[^"]*"//g' $< > $$folder/report.html; \
	$(CHROMIUM) --headless --no-sandbox --no-pdf-header-footer --print-to-pdf=$(OUT)/report.pdf \
	  $$folder/report.html 2>/dev/null && echo "$(OUT)/report.pdf" || \
	  { echo "$(CHROMIUM): cannot print; install Chromium, or name it with CHROMIUM=..." >&2; exit 1; }

samples: $(OUT)/samples.html ## the page of every answer alone: two configurations side by side, filters, stories

$(OUT)/samples.html: $(RESULT_FILES) $(ANALYSIS) $(wildcard notebooks/template/*) | $(ENV)
	@$(PY) -m helpers.analysis.samples $(OUT)

A ?= fp16
B ?= nf4
llm-comparator: $(ENV) ## answers of A and B as a file for Google PAIR's LLM Comparator (A=fp16 B=nf4)
	@$(PY) -m helpers.analysis.samples $(OUT) --pair $(A) $(B)

CONFIG ?= nf4
gate: $(ENV) ## may CONFIG=nf4 replace full precision? LEAST_RECOVERY=95 (per cent) and LARGEST_LOSS=2 (points)
	@$(PY) -m helpers.analysis.gate $(OUT) $(CONFIG) $(addprefix --least-recovery ,$(LEAST_RECOVERY)) \
	  $(addprefix --largest-loss ,$(LARGEST_LOSS))

compare: $(ENV) ## one page over several studies: does the finding survive? (STUDIES="a b c": names or folders)
	@$(PY) -m helpers.analysis.compare $(STUDIES)

figures: $(OUT)/05_figures.ipynb ## draw every figure as PNG and SVG under figures/STUDY

$(OUT)/05_figures.ipynb: notebooks/05_figures.ipynb $(STUDY_FILE) $(ANALYSIS) $(RESULT_FILES) \
  $(OUT)/04_analysis.ipynb | $(ENV)
	@$(RUN) $(NB) run notebooks/05_figures.ipynb $@ -f $(STUDY_FILE) $(FOLDER)

.PHONY: status new-study
status: $(ENV) ## table of what is fresh, stale, failed or missing
	@$(NB) status $(STUDY) $(CONFIGS)

new-study: $(ENV) ## write params/STUDY for another model: make new-study MODEL=owner/name STUDY=my-study
	@$(PY) -m helpers.new_study "$(MODEL)" "$(STUDY)"

# ---- work on it ----

.PHONY: lab test lint clean readme faults lock bench-rehearsal bench-pipeline bench-eval bench-peer bench-statistics
lab: $(ENV) ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks/04_analysis.ipynb

test: $(ENV) ## run all tests (no GPU needed; a browser test wants chromium)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile tests

lint: $(ENV) ## check code and notebooks
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) tests/check_notebooks.py

faults: $(ENV) ## break a small study on purpose, and see that nothing is lost (KILLS=100; 30 min; full disks: root)
	$(PY) -m tests.faults.run --kills $(or $(KILLS),100)

lock: ## write .requirements-lock.txt: every package that the requirements bring along, pinned
	python3 tests/lock.py

readme: $(ENV) ## render what README.md says was found, from the committed runs
	@$(PY) -m helpers.analysis.readme

bench-pipeline: $(ENV) ## time make run-all and make test, with peak memory, into executed/reference/
	$(PY) tests/bench_pipeline.py

bench-rehearsal: $(ENV) ## rehearse the gated study llama-3.2-1b: random weights, a stand-in hub (TINY=1: on a CPU)
	$(PY) tests/bench_rehearsal.py $(if $(TINY),--tiny --configs fp16 nf4 --out rehearsal.json)

bench-eval: $(ENV) ## hf-dialogue against stock lm-eval, side by side (LIMIT=dialogues)
	TOKENIZERS_PARALLELISM=true $(PY) tests/bench_eval.py --study $(STUDY) --limit $(or $(LIMIT),20) \
	  --configurations $(CONFIGS)

bench-peer: $(ENV) ## prefill and decode beside optimum-benchmark's (pip install optimum-benchmark==0.6.0)
	$(PY) tests/bench_peer.py --study $(STUDY)

bench-statistics: $(ENV) ## simulate the coverage of intervals and the level of tests
	$(PY) tests/bench_statistics.py

clean: ## delete what runs of this study wrote (not the cached weights, not executed/reference)
	@[ -z "$(RESULTS)" ] || \
	  { echo "make clean takes no RESULTS: it deletes what runs of STUDY=$(STUDY) wrote" >&2; exit 1; }
	@[ -f $(STUDY_FILE) ] || \
	  { echo "$(STUDY_FILE): there is no such study; make clean deletes what runs of a study wrote" >&2; exit 1; }
	@for made in executed/$(STUDY) figures/$(STUDY); do [ ! -d $$made ] || [ -L $$made ] || { \
	  find $$made -type f \( -name '*.ipynb' -o -name '*.json' -o -name '*.jsonl' -o -name '*.html' -o -name '*.pdf' \
	    -o -name '.*.lock' -o -name '*.png' -o -name '*.svg' -o -path 'figures/*.txt' \) -delete; \
	  find $$made -type d -empty -delete; \
	  [ ! -e $$made ] || echo "$$made is kept: it holds files that no run wrote"; }; done
