# hutch. "make help" lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help

GO      ?= go
BIN     := bin
CACHE   := $(CURDIR)/.cache
# The guest agent and the daemons are static: no cgo.
BUILD   := CGO_ENABLED=0 $(GO) build -trimpath
TOOL    := $(GO) tool -modfile=tools/go.mod
# hutchd's own root for demo and tests: kernel pack and templates, made once.
TESTROOT := $(CACHE)/root

.PHONY: help
help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/hutch, bin/hutchd and bin/hutch-agent
	@mkdir -p $(BIN)
	$(BUILD) -o $(BIN)/hutch ./cmd/hutch
	$(BUILD) -o $(BIN)/hutchd ./cmd/hutchd
	$(BUILD) -ldflags='-s -w' -o $(BIN)/hutch-agent ./cmd/hutch-agent

.PHONY: kube
kube: ## Build bin/hutch-kube, the Kubernetes for guests; kept by the hash of its sources
	kube/build.sh $(CURDIR)/$(BIN)

.PHONY: kube-test
kube-test: kube ## Test the Kubernetes for guests without a VM
	kube/test.sh $(CURDIR)/$(BIN)/hutch-kube

.PHONY: demo
demo: deps build ## Make a microVM, run a program in it, end it, show that nothing is left
	@scripts/demo

.PHONY: test
test: deps build proto-check lint ## Pass all tests, with real VMs; needs root
	REQUIRE=root,vm scripts/test

.PHONY: unit
unit: ## Run what needs neither root nor a VM
	$(GO) test -short ./...

.PHONY: bench
bench: deps build ## Measure hutch beside its floor; writes docs/benchmarks. ROWS=warm,memory: these only; QUICK=1: few samples
	scripts/bench

.PHONY: lint
lint: ## Check format, vet and static analysis
	@out=$$(gofmt -l cmd internal test 2>/dev/null); if [ -n "$$out" ]; then echo "gofmt these files:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(TOOL) staticcheck ./...

.PHONY: proto
proto: ## Generate gen/ from proto/
	$(TOOL) buf generate

.PHONY: proto-lock
proto-lock: ## Take the protos of now as what later ones must not break
	$(TOOL) buf build --exclude-source-info -o proto/lock.binpb

.PHONY: proto-check
proto-check: ## Lint the protos, check that gen/ fits and that nothing breaks
	scripts/proto-check

.PHONY: golden
golden: build ## Write the golden files of the guest agent's size and dependencies
	UPDATE_GOLDEN=1 $(GO) test ./test/golden

.PHONY: setup
setup: build ## Prepare this host: packages, kernel pack, minimal template
	$(BIN)/hutchd setup

.PHONY: deps
deps: ## Install the Debian packages that hutch and its tests need
	@scripts/deps

.PHONY: clean
clean: ## Remove what make made
	rm -rf $(BIN) $(CACHE)
