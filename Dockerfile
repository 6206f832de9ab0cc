# keyshield in a container: built in one stage, run in another as nobody in particular.
#
#   docker build -t keyshield .
#   docker run -p 8080:8080 -v ./keyshield.toml:/etc/keyshield/keyshield.toml:ro -v keyshield:/var/lib/keyshield keyshield

FROM rust:1.95-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
COPY src ./src
# Cargo wants every target of its manifest to be there.
COPY benches ./benches
# The code of the CDNs, which `keyshield cdn deploy` brings there.
COPY edge ./edge
RUN cargo build --locked --release --bin keyshield

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/keyshield --create-home --shell /usr/sbin/nologin keyshield
COPY --from=build /build/target/release/keyshield /usr/local/bin/keyshield
COPY config/keyshield.toml /etc/keyshield/keyshield.toml
# The database and the master key are made here: keep this folder.
VOLUME /var/lib/keyshield
WORKDIR /var/lib/keyshield
USER keyshield
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s \
    CMD ["keyshield", "health"]
ENTRYPOINT ["keyshield"]
CMD ["serve", "--config", "/etc/keyshield/keyshield.toml"]
