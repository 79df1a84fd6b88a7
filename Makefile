# `make help` lists the goals.

TARGET := x86_64-unknown-linux-gnu
BULLE := target/$(TARGET)/release/bulle
PREFIX ?= /usr/local
SHARE := $(PREFIX)/share
COMMAND ?= uname -a

# Statically linked: a dynamic loader takes longer than bulle takes to enter a guest.
STATIC := CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"

.PHONY: help run build test lint bench install setup

help: ## This list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

run: ## Boot Debian's kernel in a microVM and run COMMAND (uname -a) in it
	@tests/setup run
	@$(MAKE) --no-print-directory build
	@tests/run-guest $(BULLE) $(COMMAND)

build: ## The release binary
	@$(STATIC) cargo build --release --locked --quiet --target $(TARGET)

test: ## Everything: style, units, bare-metal guests, Linux guests
	@tests/setup test
	@tests/suite

lint: ## Formatting, clippy, licences and sources of dependencies
	@tests/setup lint
	@tests/lint

bench: ## Start-up against FIRECRACKER, CLOUD_HYPERVISOR and QEMU (paths), and I/O against the host
	@tests/setup bench
	@$(MAKE) --no-print-directory build
	@BULLE=$(abspath $(BULLE)) cargo bench --locked --quiet --bench start --bench api --bench clone --bench snapshot --bench io

install: build ## Install below PREFIX (/usr/local): the binary, links named firecracker and jailer, man pages, completions
	install -D -m 755 $(BULLE) $(DESTDIR)$(PREFIX)/bin/bulle
	ln -sf bulle $(DESTDIR)$(PREFIX)/bin/firecracker
	ln -sf bulle $(DESTDIR)$(PREFIX)/bin/jailer
	install -d $(DESTDIR)$(SHARE)/man/man1 $(DESTDIR)$(SHARE)/bash-completion/completions \
		$(DESTDIR)$(SHARE)/zsh/site-functions $(DESTDIR)$(SHARE)/fish/vendor_completions.d
	$(BULLE) man $(DESTDIR)$(SHARE)/man/man1
	$(BULLE) completion bash > $(DESTDIR)$(SHARE)/bash-completion/completions/bulle
	$(BULLE) completion zsh > $(DESTDIR)$(SHARE)/zsh/site-functions/_bulle
	$(BULLE) completion fish > $(DESTDIR)$(SHARE)/fish/vendor_completions.d/bulle.fish

setup: ## Install what is missing for all of these
	@tests/setup all
