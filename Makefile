.PHONY: install test lint typecheck bench ops-bench gpu-check

install:
	pip install -e '.[dev]'

test:
	pytest

lint:
	ruff check .
	ruff format --check .

# The type checker does not know setup.py's folder mapping: check a copy laid out as installed.
typecheck:
	rm -rf build/typecheck
	mkdir -p build/typecheck
	cp -r xclip_fast build/typecheck/xclip_fast
	cp -r kernels build/typecheck/xclip_fast/kernels
	cd build/typecheck && mypy --config-file ../../pyproject.toml -p xclip_fast

bench:
	python benchmarks/throughput.py

# On any CUDA machine with torch and pytest, without a network, after
#   pip install --no-build-isolation --no-deps -e .
gpu-check:
	python benchmarks/gpu_check.py

ops-bench:
	pytest benchmarks/ops -n 0 --benchmark-only --no-cov
