# Two commands do all on a fresh machine: `make sweep` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   ?= runs
CLUSTER ?= cluster.yaml
DEMO   := $(RUNS)/demo-tissue
STORE  := $(RUNS)/demo-store
HELD   := BC90007
# glibc then keeps freed activations: training on the CPU is 1.65 to 1.8 times faster (brstnet/launch.py).
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 100000000000
export MALLOC_TOP_PAD_ := 268435456
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: sweep test test-hosts test-others check quick drills ui up down leaderboard clean

## sweep: environment, demo tissue, a real small sweep, the leaderboard, the champion judged
sweep: $(VENV)/.installed
	test -d $(DEMO) || $(BIN)/python -m brstnet demo-data $(DEMO)
	$(BIN)/python -m brstnet prepare $(DEMO) $(STORE) --layout stnet --window_px 64 --input_px 64 --held_out '[$(HELD)]'
	$(BIN)/python sweeps/run.py sweeps/demo.yaml --store $(STORE) --out $(RUNS)
	$(BIN)/python sweeps/evaluate.py models:/brstnet@champion $(STORE) --patients $(HELD) \
	    --out $(RUNS)/demo/held-out --runs $(RUNS) --gene_groups $(DEMO)/truth.parquet
	$(BIN)/python dashboards/leaderboard.py --runs $(RUNS) --sweep demo

## test: environment, lint, types, all tests; those of three hosts, which mostly wait, beside the others
test: $(VENV)/.installed-dev $(VENV)/.hosts check
	$(MAKE) --jobs=2 test-hosts test-others

test-hosts:
	$(BIN)/python -m pytest -m "cluster_hosts and not drill" --durations=10

test-others:
	$(BIN)/python -m pytest -m "not cluster_hosts and not drill" --durations=40

## quick: the tests that a developer runs all the time (under 3 minutes)
quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile -m "not slow and not cluster and not gpu and not browser and not drill"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## drills: twenty kills at random moments of small real sweeps, compared with undisturbed ones
drills: $(VENV)/.installed-dev $(VENV)/.hosts
	$(BIN)/python -m pytest -m drill
	PYTHONPATH=tests $(BIN)/python -m drills $(if $(SEED),--seed $(SEED))

## ui: the MLflow UI on 127.0.0.1, at the sweeps' runs
ui: $(VENV)/.installed
	$(BIN)/python sweeps/ui.py --runs $(RUNS)

## up, down: a cluster, and its end; `python -m clusters --help` has all between
up down: $(VENV)/.installed-cluster
	$(BIN)/python -m clusters $@ $(CLUSTER)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[genes]'
	touch $@

$(VENV)/.installed-cluster: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[cluster,gcp]'
	touch $@

# sshd and rsync for the hosts of tests/cluster, unpacked beside the environment, not installed. If
# they cannot be had those tests are skipped and say why; the next `make` tries again.
$(VENV)/.hosts: tests/cluster/debian.sh | $(BIN)/python
	sh tests/cluster/debian.sh $(VENV)/debian
	test -e $(VENV)/debian/why || touch $@

# staintools drags in opencv-python, which wants libGL and overlays the headless build's files:
# the headless build goes back on top, so that both are installed and cv2 imports anywhere.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps --force-reinstall opencv-python-headless
	touch $@ $(VENV)/.installed
