PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SANITIZED := build/sanitized

.PHONY: demo test test-slow lint bench score report wheel sanitize clean

demo: $(INSTALLED)
	$(BIN)/videopure-fast demo

test: lint
	$(BIN)/pytest

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check

bench: $(INSTALLED)
	$(BIN)/pytest bench -q

# The README's table of accuracies: 256 clips of a seed that nothing else uses.
score: $(INSTALLED)
	$(BIN)/videopure-fast demo --clips 256 --seed 20260 --out build/score --json bench/results/tiny-prior.json

report: $(INSTALLED)
	$(BIN)/python bench/report.py

# The constraints are the versions that were tried together.
$(INSTALLED): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

wheel: $(INSTALLED)
	rm -rf build/lib*
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

# The CPU ops under AddressSanitizer and UBSan. Python itself never frees everything: no leak check.
sanitize: $(INSTALLED)
	rm -rf $(SANITIZED)
	CMAKE_ARGS="-DVPF_CUDA=OFF -DVPF_SANITIZE=ON" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --target $(SANITIZED) .
	LD_PRELOAD="$$($${CC:-gcc} -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
		$(BIN)/pytest tests/test_ops.py -k "not triton"

clean:
	rm -rf build dist *.egg-info videopure_fast/_C.*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
