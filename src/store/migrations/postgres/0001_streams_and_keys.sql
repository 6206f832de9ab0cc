-- Streams, their keys and their schedules. Secrets are stored wrapped only.
-- Times are milliseconds since 1970; those called *_db are the database's own, by which nodes hear of changes.

CREATE TABLE streams (
    id                TEXT    PRIMARY KEY,
    playlist_url      TEXT    NOT NULL,
    playlist_path     TEXT    NOT NULL,
    origin            TEXT    NOT NULL,
    prefix            TEXT    NOT NULL,
    -- JSON.
    cdn               TEXT    NOT NULL,
    policy            TEXT    NOT NULL,
    -- JSON: the call that began it, to be compared with another. Null where the configuration began it.
    request           TEXT,
    -- running, stopped, or deleted: then only the history of its keys is left.
    state             TEXT    NOT NULL,
    created_at        BIGINT  NOT NULL,
    updated_at        BIGINT  NOT NULL,
    -- Goes up with every change of the stream, its keys and its boundaries.
    rev               BIGINT  NOT NULL,
    changed_at_db     BIGINT  NOT NULL,
    -- Goes up when a deleted stream begins anew.
    incarnation       BIGINT  NOT NULL
);
CREATE UNIQUE INDEX streams_by_prefix ON streams (origin, prefix) WHERE state <> 'deleted';
CREATE INDEX streams_by_change ON streams (changed_at_db);

-- A data encryption key: wraps the content keys of one stream, and is itself wrapped by the KMS.
CREATE TABLE deks (
    id                TEXT    PRIMARY KEY,
    stream_id         TEXT    NOT NULL REFERENCES streams (id),
    version           BIGINT  NOT NULL,
    kek_id            TEXT    NOT NULL,
    -- Empty once shredded.
    wrapped           BYTEA   NOT NULL,
    created_at        BIGINT  NOT NULL,
    UNIQUE (stream_id, version)
);

-- A content key with its link key, wrapped together under a DEK. `wrapped` is empty once destroyed.
CREATE TABLE content_keys (
    id                TEXT    PRIMARY KEY,
    stream_id         TEXT    NOT NULL REFERENCES streams (id),
    ordinal           BIGINT  NOT NULL,
    dek_id            TEXT    NOT NULL REFERENCES deks (id),
    method            TEXT    NOT NULL,
    iv_mode           TEXT    NOT NULL,
    wrapped           BYTEA   NOT NULL,
    state             TEXT    NOT NULL,
    created_at        BIGINT  NOT NULL,
    activated_at      BIGINT,
    activated_for     TEXT,
    activated_by      TEXT,
    -- Whether every rendition must go over to it.
    forced            BIGINT  NOT NULL,
    deactivated_at    BIGINT,
    compromised_at    BIGINT,
    revoked_by        TEXT,
    revoked_for       TEXT,
    -- Of a revoked key: what takes its place, and until when it may still be used towards players that hold an
    -- older playlist.
    successor         BIGINT,
    transition_until  BIGINT,
    destroyed_at      BIGINT,
    -- When a playlist that names it was last served after its deactivation.
    last_named_at     BIGINT,
    UNIQUE (stream_id, ordinal)
);

-- A year of rotations is long; what a node loads is short.
CREATE INDEX content_keys_kept ON content_keys (stream_id, ordinal) WHERE state <> 'destroyed';
CREATE INDEX content_keys_named ON content_keys (last_named_at)
    WHERE state IN ('deactivated', 'compromised') AND last_named_at IS NOT NULL;

-- From `first_msn` on, in `epoch`, the rendition's segments are under `ordinal`. Rows are only added, one
-- behind the other, so that two nodes that add the same `seq` find out; they go with the keys that they name.
CREATE TABLE boundaries (
    stream_id         TEXT    NOT NULL REFERENCES streams (id),
    rendition         TEXT    NOT NULL,
    seq               BIGINT  NOT NULL,
    epoch             BIGINT  NOT NULL,
    ordinal           BIGINT  NOT NULL,
    first_msn         BIGINT  NOT NULL,
    -- After so many segments the count asks for the next one.
    segments          BIGINT  NOT NULL,
    reason            TEXT    NOT NULL,
    -- The window that the boundary was planned from.
    edge_first        BIGINT  NOT NULL,
    edge_end          BIGINT  NOT NULL,
    created_at        BIGINT  NOT NULL,
    PRIMARY KEY (stream_id, rendition, seq)
);

-- What nodes tell one another, and a restart, of a rendition.
CREATE TABLE renditions (
    stream_id         TEXT    NOT NULL REFERENCES streams (id),
    rendition         TEXT    NOT NULL,
    -- Nothing will be appended; nothing will be removed.
    ended             BIGINT  NOT NULL,
    keeps_all         BIGINT  NOT NULL,
    target_millis     BIGINT  NOT NULL,
    longest_millis    BIGINT  NOT NULL,
    -- The newest window that was served, and when one was.
    epoch             BIGINT  NOT NULL,
    edge_first        BIGINT  NOT NULL,
    edge_end          BIGINT  NOT NULL,
    last_served_at    BIGINT  NOT NULL,
    reported_at_db    BIGINT  NOT NULL,
    PRIMARY KEY (stream_id, rendition)
);
CREATE INDEX renditions_by_report ON renditions (reported_at_db);

-- What only one node does at a time.
CREATE TABLE leases (
    name              TEXT    PRIMARY KEY,
    holder            TEXT    NOT NULL,
    expires_at_db     BIGINT  NOT NULL
);

-- The nodes that are up, or were a moment ago.
CREATE TABLE nodes (
    id                TEXT    PRIMARY KEY,
    seen_at_db        BIGINT  NOT NULL
);
