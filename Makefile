# make serve · make test · make lint            (works with make 3.81)
# make bench                                    phi3v beside mlx-lm and mlx-vlm, about 20 minutes: BENCHMARKS.md
# make test-clients                             the clients that people have, for Python and for node, which it needs
# make test-page                                the chat page in Debian's Chromium, as a person uses it
# make test-deploy                              deploy/nginx.conf before two real replicas, with Debian's nginx
# make screenshots                              docs/page.png, from the running product
# make guarantees                               what SECURITY.md promises, measured against real servers, 15 minutes
# make soak                                     2,000 random requests, each compared with its lone run
# make serve                                    the embedded model; ARGS="--port 9000" are further options of `phi3v serve`
# make serve EXTRA=cuda13                       another MLX backend than the one found: cpu, cuda12, cuda13
# make serve PYTHON=/path/to/python3.13         another Python than the one found

VENV = .venv
BIN = $(VENV)/bin
PYTHONS = $(PYTHON) python3.13 python3.12 python3.14 python3 python
CHROMIUM = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
  apt-get install -qq --no-install-recommends chromium libnss3-tools fonts-inter >/dev/null || true; fi
NEED = import sys; sys.exit(sys.version_info < (3, 12, 3))

serve: $(VENV)/ready
	@exec $(BIN)/phi3v serve --first-key --model demo $(ARGS)

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@files=$$(ls phi3v/*.py | wc -l) lines=$$(cat phi3v/*.py | wc -l); \
	echo "phi3v/: $$((files)) Python files of at most 22, $$((lines)) lines: 5740 at most, 3500 in the end"; \
	test $$files -le 22 -a $$lines -le 5740

bench: $(VENV)/ready
	@$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python bench/compare.py --size demo $(ARGS)
	$(BIN)/python bench/compare.py --size small $(ARGS)
	$(BIN)/python bench/cpu.py
	$(BIN)/python bench/conversions.py
	$(BIN)/python bench/overhead.py

test-clients: $(VENV)/ready $(VENV)-clients/ready $(VENV)-clients-openai2/ready tests/clients/node_modules/ready
	$(VENV)-clients/bin/python -m pytest tests/clients $(ARGS)

test-page: $(VENV)/ready $(VENV)-page/ready
	@$(CHROMIUM)
	$(VENV)-page/bin/python -m pytest tests/page $(ARGS)

test-deploy: $(VENV)/ready-dev
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v nginx >/dev/null; then \
	  apt-get update -qq; apt-get install -qq --no-install-recommends nginx-light >/dev/null; fi
	$(BIN)/python -m pytest tests/deploy $(ARGS)

screenshots: $(VENV)/ready $(VENV)-page/ready
	@$(CHROMIUM)
	$(VENV)-page/bin/python bench/showcase.py

# The programs are Debian's: installed where that is possible, and otherwise named in the lines that need them.
guarantees: $(VENV)/ready-dev $(VENV)-guarantees/ready $(VENV)-clients/ready
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get install -qq --no-install-recommends wrk apache2-utils nghttp2-client slowhttptest testssl.sh >/dev/null || true; \
	fi
	$(VENV)-guarantees/bin/python bench/guarantees/run.py $(ARGS)

soak: $(VENV)/ready-dev
	PHI3V_SOAK=2000 $(BIN)/python -m pytest tests/test_soak.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-clients-openai2 $(VENV)-guarantees $(VENV)-page tests/clients/node_modules

# Plain mlx has no backend on Linux, and two backends overwrite each other: exactly one is chosen here.
$(VENV)/ready: pyproject.toml
	@found=; for p in $(PYTHONS); do \
	  if $$p -c '$(NEED)' 2>/dev/null; then found=$$p; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "phi3v needs Python 3.12.3 or newer and found none: install it from python.org," \
	    "with 'brew install python' or 'apt install python3 python3-venv', or name it: make PYTHON=/path/to/python3"; \
	  exit 1; \
	fi; \
	$$found -m venv $(VENV) || { \
	  echo "that Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }; \
	extra="$(EXTRA)"; \
	if [ -z "$$extra" ] && [ "$$(uname -s)" != Darwin ]; then \
	  case "$$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')" in \
	    12) extra=cuda12;; 1[3-9]) extra=cuda13;; *) extra=cpu;; \
	  esac; \
	fi; \
	echo "installing phi3v$${extra:+ with MLX's $$extra backend} into $(VENV): about a minute, once ..."; \
	$(BIN)/python -m pip install --quiet --upgrade pip && \
	$(BIN)/python -m pip install --quiet --editable ".$${extra:+[$$extra]}"
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@$(BIN)/python -m pip install --quiet --group dev
	@touch $@

# What clients need conflicts with what phi3v needs, and openai 2 with 3: each group has an environment of its own.
$(VENV)-%/ready: pyproject.toml $(VENV)/ready
	@$(BIN)/python -m venv $(VENV)-$*
	@$(VENV)-$*/bin/python -m pip install --quiet --upgrade pip
	@$(VENV)-$*/bin/python -m pip install --quiet --group $*
	@touch $@

tests/clients/node_modules/ready: tests/clients/package-lock.json
	@cd tests/clients && npm ci --loglevel=error --no-audit --no-fund
	@touch $@

.PHONY: serve test test-clients test-page test-deploy screenshots lint bench guarantees soak clean
