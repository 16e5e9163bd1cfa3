"""Maps the folders to packages; everything declarative is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["xclip_fast", "xclip_fast.data", "xclip_fast.kernels", "xclip_fast.kernels.triton", "xclip_fast.nn"],
    package_dir={"xclip_fast.kernels": "kernels", "xclip_fast.kernels.triton": "kernels/triton"},
    package_data={
        "xclip_fast": ["py.typed", "configs/*.yaml"],
        "xclip_fast.data": ["*.gz", "*.txt"],
        "xclip_fast.kernels.triton": ["*.json"],
    },
)
