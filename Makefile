# What a person types. Each target installs what it needs and lacks (scripts/bootstrap.sh).

CARGO ?= cargo
# Most of the tests wait for players in real time: more of them than cores can do so at once.
TEST_THREADS ?= 6

.PHONY: help demo test check fmt build clip clean

help:
	@echo "make demo    play an encrypted, rotating live stream at http://127.0.0.1:8080/demo/master.m3u8"
	@echo "make test    run every test, real players included"
	@echo "make check   format and lints"
	@echo "make build   an optimised binary at target/release/keyshield"
	@echo "make clip    make the demo's clip anew (needs ffmpeg)"

demo:
	@scripts/bootstrap.sh demo
	$(CARGO) run --locked -- demo

test:
	@scripts/bootstrap.sh test
	$(CARGO) test --locked --all-targets -- --test-threads=$(TEST_THREADS)

check: fmt
	@scripts/bootstrap.sh build
	$(CARGO) clippy --locked --all-targets -- -D warnings

fmt:
	$(CARGO) fmt --check

build:
	@scripts/bootstrap.sh build
	$(CARGO) build --locked --release

clip:
	sh scripts/make-demo-clip.sh

clean:
	$(CARGO) clean
