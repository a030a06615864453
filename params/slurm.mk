# make -j40 run-all PROFILE=slurm: every notebook is a job of its own, and Make, on the login node, waits for it.
#
# Slurm gives each job its GPU (CUDA_VISIBLE_DEVICES), so the project's own locks stay out of it. What it takes: this
# folder on a file system that all nodes see, `make setup` run once before (or PYTHON=), and the limits of your cluster
# in SLURM_OPTIONS. -j says how many jobs wait in the queue at most; where fewer are allowed, srun waits and tries
# again.
# A job that is cancelled or whose node dies fails alone: make -k, or the same command again, makes what is missing.
# Inside an allocation (salloc, sbatch) the same works: add --exact to SLURM_OPTIONS.
SLURM_OPTIONS ?= --cpus-per-task=4 --mem=32G --time=4:00:00
# 04 and 05 only read results. A time wants a quiet node: add $(if $(findstring /02_,$@),--exclusive).
RUN = srun --ntasks=1 $(if $(filter %/04_analysis.ipynb %/05_figures.ipynb,$@),,--gpus=1) --job-name=$(STUDY) \
  $(SLURM_OPTIONS)
# A login node has no GPU that would say so.
PROCESSES ?= 3
