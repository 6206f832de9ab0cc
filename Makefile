# What a person types. Each target installs what it needs and lacks (scripts/bootstrap.sh).

CARGO ?= cargo
# Most of the tests wait for players in real time: more of them than cores can do so at once.
TEST_THREADS ?= 4
# With the points at which tests kill the process. One build for all tests; never a release (src/fault.rs).
# What tests store is thrown away: where there is memory for it, they do not wait for a disk to have it.
SHM := $(shell [ "$$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 ] 2>/dev/null && echo /dev/shm)
TEST = $(if $(SHM),TMPDIR=$(SHM) )$(CARGO) test --locked --features faults

.PHONY: help demo test fleet outage low-latency bench-sweep bench-kms bench-revoke check fmt build clip clean

help:
	@echo "make demo    play an encrypted, rotating live stream at http://127.0.0.1:8080/demo/master.m3u8"
	@echo "make test    run every test, real players included"
	@echo "make fleet   run two nodes behind a load balancer for ten minutes (FLEET_SECS for another time)"
	@echo "make outage  take the store, then a node, away under load for a minute (OUTAGE_SECS for another time)"
	@echo "make low-latency  how much later parts are there through the shield (LL_SECS for another time)"
	@echo "make bench-sweep  what sweeps cost at up to 100,000 streams (SIZES=100,1000 for others)"
	@echo "make bench-kms  what 10,000 streams ask of the KMS (STREAMS and ROTATIONS for others)"
	@echo "make bench-revoke  how long revocations take until every CDN is done (STREAMS=100,1000 for others)"
	@echo "make check   format and lints"
	@echo "make build   an optimised binary at target/release/keyshield"
	@echo "make clip    make the demo's clip anew (needs ffmpeg)"

demo:
	@scripts/bootstrap.sh demo
	$(CARGO) run --locked -- demo

test:
	@scripts/bootstrap.sh test
	$(TEST) --all-targets -- --test-threads=$(TEST_THREADS)

fleet:
	@scripts/bootstrap.sh test
	FLEET_SECS=$${FLEET_SECS:-600} $(TEST) --test it -- --nocapture fleet::two_nodes

outage:
	@scripts/bootstrap.sh test
	OUTAGE_SECS=$${OUTAGE_SECS:-60} $(TEST) --test it -- --nocapture --test-threads=1 outage::

low-latency:
	@scripts/bootstrap.sh test
	LL_SECS=$${LL_SECS:-120} $(TEST) --test it -- --nocapture ll_latency::

bench-sweep:
	@scripts/bootstrap.sh test
	$(CARGO) bench --locked --bench sweep -- $(if $(SIZES),--sizes $(SIZES))

bench-kms:
	@scripts/bootstrap.sh test
	$(CARGO) bench --locked --bench kms -- $(if $(STREAMS),--streams $(STREAMS)) $(if $(ROTATIONS),--rotations $(ROTATIONS))

bench-revoke:
	@scripts/bootstrap.sh test
	$(CARGO) bench --locked --bench revoke -- $(if $(STREAMS),--streams $(STREAMS))

check: fmt
	@scripts/bootstrap.sh build
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --all-targets --features faults -- -D warnings
	$(CARGO) clippy --locked --all-targets --no-default-features -- -D warnings

fmt:
	$(CARGO) fmt --check

build:
	@scripts/bootstrap.sh build
	$(CARGO) build --locked --release

clip:
	sh scripts/make-demo-clip.sh

clean:
	$(CARGO) clean
