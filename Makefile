.PHONY: install test lint typecheck bench ops-bench gpu-check gpu-rehearse gpu-bundle

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

# On any CUDA machine with torch, without a network; installed or not.
gpu-check:
	python benchmarks/gpu_check.py --out build/gpu-check

# The same on a CPU, tiny: every stage must give its rows.
gpu-rehearse:
	python benchmarks/gpu_check.py --rehearse --out build/gpu-rehearsal

# One folder to carry to a bare machine; nothing is built there.
gpu-bundle:
	python benchmarks/gpu_bundle.py dist/gpu-bundle

ops-bench:
	pytest benchmarks/ops -n 0 --benchmark-only --no-cov
