# Every target does the set-up that it needs. PYTHON=... and TORCH=pinned|keep are explained in .ci/setup.
.PHONY: setup lint test layouts faults extras chaos bench gpu-check quickstart
# An environment that exists stays as it was made.
TORCH ?= $(or $(patsubst .venv/setup-%.stamp,%,$(wildcard .venv/setup-*.stamp)),pinned)
STAMP := .venv/setup-$(TORCH).stamp
PYTEST := .venv/bin/python -m pytest --no-skips
# Two files at a time: most of a test of whole commands is starting processes.
TWO := --numprocesses 2 --dist loadfile
# Whether any test carries the marker is asked quietly first: pytest calls a selection without tests a failure.
MARKED = if $(PYTEST) --collect-only -qq -m $(1) >/dev/null 2>&1; then $(PYTEST) $(2) -m $(1); \
	else code=$$?; [ $$code -eq 5 ] || { $(PYTEST) --collect-only -m $(1); exit $$code; }; \
	echo "make $@: no test is marked $(1) yet, so nothing was shown."; fi

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt .ci/setup
	TORCH=$(TORCH) .ci/setup
	@touch $@

lint: setup
	.ci/lint

test: setup
	$(PYTEST) $(TWO) -m "not layouts and not faults and not extras and not chaos and not gpu"

# Every layout of docs/training.md against one rank, in curves and gradients; long.
layouts: setup
	@$(call MARKED,layouts,$(TWO))

# Injected faults: killed ranks, torn files, full disks, hangs.
faults: setup
	@$(call MARKED,faults,$(TWO))

# Optional engines and services.
extras: setup
	@if .ci/extras; then $(call MARKED,extras); else code=$$?; [ $$code -eq 5 ] || exit $$code; fi

# Kills at random moments; long.
chaos: setup
	@$(call MARKED,chaos)

# Ratios measured side by side, one file a question.
bench: setup
	@files=$$(ls bench/*.py 2>/dev/null); [ -n "$$files" ] || echo "make bench: bench/ holds no measurement yet."; \
	for file in $$files; do echo "== $$file"; .venv/bin/python $$file || exit 1; done

# What only a GPU can show.
gpu-check: setup
	@if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(call MARKED,gpu); \
	else echo "make gpu-check: this machine has no GPU that torch can use, so nothing was shown."; fi

quickstart: setup
	.venv/bin/python -m moexpand.launch.quickstart
