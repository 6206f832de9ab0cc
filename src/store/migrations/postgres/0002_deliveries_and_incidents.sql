-- What CDNs have of keys, and keys that were taken back. A row says which keys; no row holds one.

-- What each CDN has of each key. A key that a CDN has nothing of has no row.
CREATE TABLE deliveries (
    cdn               TEXT    NOT NULL,
    key_id            TEXT    NOT NULL,
    -- No reference: after a stream was erased its keys are still to be taken out of the edges.
    stream_id         TEXT    NOT NULL,
    ordinal           BIGINT  NOT NULL,
    -- sending (the CDN may have it), stored, or verified by reading it back through the edge.
    state             TEXT    NOT NULL,
    last_error        TEXT,
    updated_at        BIGINT  NOT NULL,
    PRIMARY KEY (cdn, key_id)
);
CREATE INDEX deliveries_by_key ON deliveries (key_id);

-- How each CDN is, as the node that delivers has found it.
CREATE TABLE cdns (
    name              TEXT    PRIMARY KEY,
    -- Null while it does what it is asked.
    failing_since     BIGINT,
    failures          BIGINT  NOT NULL,
    last_error        TEXT,
    -- Which edge secret its keys are sealed under, by a fingerprint; none: they come from the shield.
    sealed_under      TEXT,
    updated_at        BIGINT  NOT NULL
);

-- Keys that were taken back: by whom, when and why. The ID begins with the time.
CREATE TABLE incidents (
    id                TEXT    PRIMARY KEY,
    stream_id         TEXT    NOT NULL REFERENCES streams (id),
    reason            TEXT    NOT NULL,
    actor             TEXT    NOT NULL,
    revoked_at        BIGINT  NOT NULL,
    transition_until  BIGINT  NOT NULL,
    successor_id      TEXT    NOT NULL,
    -- JSON: the IDs of the keys; paths at which segments under them were served.
    key_ids           TEXT    NOT NULL,
    paths             TEXT    NOT NULL,
    -- When nothing was left to be done at any CDN.
    completed_at      BIGINT
);
CREATE INDEX incidents_open ON incidents (id) WHERE completed_at IS NULL;
CREATE INDEX incidents_by_stream ON incidents (stream_id, id);

-- What each CDN has done about an incident.
CREATE TABLE incident_cdns (
    incident_id       TEXT    NOT NULL REFERENCES incidents (id),
    cdn               TEXT    NOT NULL,
    -- pending, purged (and to be looked at), complete, or abandoned: the configuration has no such CDN any more.
    state             TEXT    NOT NULL,
    purges            BIGINT  NOT NULL,
    purged_at         BIGINT,
    last_error        TEXT,
    updated_at        BIGINT  NOT NULL,
    completed_at      BIGINT,
    PRIMARY KEY (incident_id, cdn)
);
