PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LATENCY := .venv/.latency
RAY := .venv/.ray
BROWSER := .venv/.browser
SANITIZED := build/sanitized
OLDEST := build/aot-3.6

.PHONY: demo test test-slow test-realtime test-scale test-serve test-page fuzz lint bench latency aot aot-3.6 gpu gpu-test gpu-bench gpu-tune gpu-compile study report picture wheel sanitize clean

demo: $(INSTALLED)
	$(BIN)/videopure-fast demo

# A process a core, of one thread each. BLAS and OpenMP have more in `make test-slow`.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

# Soaks, overloads and theory in wall time, LoadGen and SimPy: half an hour, with nothing else on the machine.
test-realtime: $(LATENCY)
	$(BIN)/pytest -m realtime

# Ray, processes that are killed, and ten thousand rows: minutes.
test-scale: $(RAY)
	$(BIN)/pytest -m scale

# A running service under hostile requests and load, and as replicas of Ray Serve: a quarter of an hour.
test-serve: $(RAY)
	$(BIN)/pytest -m serve

# The page of the service and the report in a real browser: chromium must be on the PATH, as Debian's package puts it.
test-page: $(BROWSER)
	$(BIN)/pytest -m page

# Damaged input, from fixed seeds, in processes of its own.
fuzz: $(INSTALLED)
	$(BIN)/pytest -m fuzz

# .pre-commit-config.yaml runs the same tools.
lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*)

# Fails if a speed goal is missed, but writes the rows all the same: each of them has passed its check.
bench: $(INSTALLED)
	mkdir -p build
	$(BIN)/pytest bench -q --benchmark-json=build/cpu.json; status=$$?; mv build/cpu.json bench/results/cpu.json; exit $$status

# These need a GPU and run with the packages that PYTHON has: no venv is made and nothing is downloaded. The first takes 12
# minutes at most, and says for what; making a target again goes on where it was cut off. `python bench/gpu.py --help`
# explains.
gpu:
	$(PYTHON) bench/gpu.py

gpu-test gpu-bench gpu-tune gpu-compile: gpu-%:
	$(PYTHON) bench/gpu.py --stage build
	$(PYTHON) bench/gpu.py --stage $*

# The study of bench/LATENCY.md: three quarters of an hour, with nothing else on the machine.
latency: $(LATENCY)
	$(BIN)/python bench/latency.py

$(LATENCY): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mlcommons-loadgen simpy
	touch $@

$(RAY): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "ray[data,serve]"
	touch $@

$(BROWSER): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	touch $@

# Every kernel at every shape, for GPUs that need not be here: half an hour of processor time.
aot: $(INSTALLED)
	$(BIN)/python bench/aot.py

# The same by the oldest triton that is supported, in an environment that takes everything else from .venv.
aot-3.6: $(OLDEST)/.installed
	$(OLDEST)/bin/python bench/aot.py --out bench/results/aot-3.6.json

$(OLDEST)/.installed: $(INSTALLED)
	$(BIN)/python -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check triton==3.6.0
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	touch $@

# The README's table of robust accuracies: takes many hours. When interrupted, make it again: it continues.
study: $(INSTALLED)
	$(BIN)/python bench/study.py

report: $(INSTALLED)
	$(BIN)/python bench/report.py

# The README's picture of `videopure-fast report`: chromium must be on the PATH.
picture: $(BROWSER)
	$(BIN)/python bench/picture.py

# constraints.txt has the versions that were tested together.
$(INSTALLED): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "Installing into .venv, as on a first run: downloads torch and more, and compiles the extension. This takes minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

wheel: $(INSTALLED)
	rm -rf build/lib*
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

# The CPU ops under AddressSanitizer and UBSan. Python itself never frees everything: no leak check. libstdc++ is loaded
# first, or the sanitizer would not know how exceptions are thrown.
sanitize: $(INSTALLED)
	rm -rf $(SANITIZED)
	CMAKE_ARGS="-DVPF_CUDA=OFF -DVPF_SANITIZE=ON" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --target $(SANITIZED) .
	LD_PRELOAD="$$($${CC:-gcc} -print-file-name=libasan.so) $$($${CC:-gcc} -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
		$(BIN)/pytest $$(grep -rl "from op_cases" tests --include="test_*.py" | grep -v golden) -k "not triton and not compiles"

clean:
	rm -rf build dist *.egg-info videopure_fast/_C.*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
