-- Streams, their keys and their schedules. Secrets are stored wrapped only.

CREATE TABLE streams (
    id          TEXT    PRIMARY KEY,
    created_at  BIGINT  NOT NULL
);

-- A data encryption key: wraps the content keys of one stream, and is itself wrapped by the KMS.
CREATE TABLE deks (
    id          TEXT    PRIMARY KEY,
    stream_id   TEXT    NOT NULL REFERENCES streams (id),
    version     INTEGER NOT NULL,
    kek_id      TEXT    NOT NULL,
    wrapped     BLOB    NOT NULL,
    created_at  BIGINT  NOT NULL,
    UNIQUE (stream_id, version)
);

-- A content key with its link key, wrapped together under a DEK. `wrapped` is empty once destroyed.
CREATE TABLE content_keys (
    id             TEXT    PRIMARY KEY,
    stream_id      TEXT    NOT NULL REFERENCES streams (id),
    ordinal        INTEGER NOT NULL,
    dek_id         TEXT    NOT NULL REFERENCES deks (id),
    method         TEXT    NOT NULL,
    iv_mode        TEXT    NOT NULL,
    wrapped        BLOB    NOT NULL,
    state          TEXT    NOT NULL,
    created_at     BIGINT  NOT NULL,
    activated_at   BIGINT,
    activated_for  TEXT,
    deactivated_at BIGINT,
    destroyed_at   BIGINT,
    UNIQUE (stream_id, ordinal)
);

-- From `first_msn` on, in `epoch`, the rendition's segments are under `ordinal`. Rows are only added, one
-- behind the other, so that two nodes that add the same `seq` find out.
CREATE TABLE boundaries (
    stream_id   TEXT    NOT NULL REFERENCES streams (id),
    rendition   TEXT    NOT NULL,
    seq         INTEGER NOT NULL,
    epoch       INTEGER NOT NULL,
    ordinal     INTEGER NOT NULL,
    first_msn   BIGINT  NOT NULL,
    reason      TEXT    NOT NULL,
    -- The window that the boundary was planned from.
    edge_first  BIGINT  NOT NULL,
    edge_end    BIGINT  NOT NULL,
    created_at  BIGINT  NOT NULL,
    PRIMARY KEY (stream_id, rendition, seq)
);

-- What a restart must know of a rendition besides its boundaries.
CREATE TABLE renditions (
    stream_id               TEXT    NOT NULL REFERENCES streams (id),
    rendition               TEXT    NOT NULL,
    -- Nothing will be appended; nothing will be removed.
    ended                   BOOLEAN NOT NULL,
    keeps_all               BOOLEAN NOT NULL,
    longest_playlist_millis BIGINT  NOT NULL,
    PRIMARY KEY (stream_id, rendition)
);
