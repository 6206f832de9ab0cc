// keyshield at Cloudflare: gives out content keys from Workers KV, so that a key request need not reach the shield.
//
// The shield stores each key sealed (docs/cdn-cloudflare.md), and whoever can list the namespace reads no key: what
// opens it are two secrets of this worker. A viewer's token is checked here, when there is a secret for that. What the
// store does not have (yet, or any more) the shield is asked for, as if this worker were not there: a revoked key is
// then its 410. Answers have the headers that the shield's have, and say `Keyshield-Served-By: edge`.
//
// One file without dependencies, so that what is deployed is what was read. Deliberately absent: a cache of opened
// keys. KV's own, of sealed ones, forgets a deleted key within a minute; one here would hold it until the isolate ends.
//
// Bindings (wrangler.toml):
//   KEYS                 the KV namespace
//   EDGE_ENCRYPTION_KEY  secret, 64 hex digits       } printed by `keyshield cdn secrets`
//   EDGE_MAC_KEY         secret, 64 hex digits       }
//   EDGE_TOKEN_KEY       secret, 64 hex digits; without it no token is asked for
//   KEY_PATH             what stands before key IDs, besides /api/hls/keys/, at which the shield answers always
//   KEY_MAX_AGE          for how many seconds a player may keep a key; default 300
//   CORS_ORIGINS         origins that may read answers, separated by commas; default *
//   KV_CACHE_SECS        for how long KV's caches may keep a pair; default 30, the least that KV takes

const KEY_PATH = "/api/hls/keys/";
const ALLOWED_METHODS = "GET, HEAD, OPTIONS";
const EXPOSED = "Accept-Ranges, Age, Content-Length, Content-Range, ETag";
// Of a stream ID and of hexadecimal texts. What matches none of these is not compared with anything.
const STREAM = /^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$/;
const KEY_ID = /^[0-9a-f]{32}$/;
const MAC = /^[0-9a-f]{64}$/;
const NONCE = /^[0-9a-f]{32}$/;
// AES-128 and AES-256.
const SEALED = /^(?:[0-9a-f]{32}|[0-9a-f]{64})$/;
const SECRET = /^[0-9a-f]{64}$/;

export default {
  async fetch(request, env) {
    const asked = keyAskedFor(new URL(request.url), [KEY_PATH, env.KEY_PATH || KEY_PATH]);
    if (!asked) return fetch(request);
    const answer = await answered(request, env, asked);
    return answer ?? fetch(request);
  },
};

/**
 * Which key a URL asks for, and whether for its check value. Null for what is not this worker's: that goes to the shield,
 * which takes no other spelling of a key's path for one, so that nobody comes by without a token.
 */
function keyAskedFor(url, keyPaths) {
  const keyPath = keyPaths.find((path) => url.pathname.startsWith(path));
  if (!keyPath) return null;
  const [id, what, ...more] = url.pathname.slice(keyPath.length).split("/");
  const isCheck = what === "check" && more.length === 0;
  if (!KEY_ID.test(id) || (what !== undefined && !isCheck)) return null;
  return { id, isCheck, token: url.searchParams.get("token") };
}

/** The answer of the edge, or null when the shield is to answer. */
async function answered(request, env, asked) {
  if (request.method === "OPTIONS") return preflight(request, env);
  if (request.method !== "GET" && request.method !== "HEAD") {
    const headers = { Allow: ALLOWED_METHODS };
    return problem(request, env, 405, "Method Not Allowed", "only GET, HEAD and OPTIONS are answered here", headers);
  }
  return asked.isCheck ? check(request, env, asked) : key(request, env, asked);
}

async function key(request, env, { id, token }) {
  const isGuarded = Boolean(env.EDGE_TOKEN_KEY);
  // Before the store is read: whoever shows nothing learns nothing, and costs nothing.
  const scope = isGuarded ? await scopeOfToken(env, token) : "*";
  if (scope === null) {
    return forbidden(request, env, "this key needs a token in its query that is this service's and has not run out");
  }
  const opened = await readKey(env, id);
  if (opened.fault || !opened.key) return null;
  const { stream, bytes } = opened.key;
  if (scope !== "*" && scope !== stream) {
    return forbidden(request, env, "this token is for another stream");
  }
  return reply(request, env, 200, bytes, {
    "Content-Type": "application/octet-stream",
    "Cache-Control": `private, max-age=${env.KEY_MAX_AGE || "300"}`,
    "X-Content-Type-Options": "nosniff",
    "Surrogate-Key": `keyshield-stream-${stream} keyshield-key-${id}`,
    "Cache-Tag": `keyshield-stream-${stream},keyshield-key-${id}`,
    "Keyshield-Key": id,
  });
}

/** What the edge has of a key, for the shield to compare. Never asked of the shield: the edge speaks for itself. */
async function check(request, env, { id }) {
  const opened = await readKey(env, id);
  if (opened.fault) {
    return problem(request, env, 503, "Service Unavailable", "the key store does not answer");
  }
  if (!opened.key) {
    return problem(request, env, 404, "Not Found", "the key store at the edge has no such key");
  }
  const value = await hmac(hexOf(opened.key.bytes), `keyshield check ${id}`);
  return reply(request, env, 200, hexOf(value.subarray(0, 8)), {
    "Content-Type": "text/plain",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
  });
}

/**
 * A key from the store: `{key: {stream, bytes}}`, `{}` if there is none, `{fault: true}` if nobody can tell. One that
 * does not open is none: it is logged, without what it holds.
 */
async function readKey(env, id) {
  let record;
  try {
    record = await env.KEYS.get(`key:${id}`, { type: "text", cacheTtl: Number(env.KV_CACHE_SECS || "30") });
  } catch (error) {
    console.error(`key ${id}: the store does not answer: ${error.message}`);
    return { fault: true };
  }
  if (record === null) return {};
  try {
    return { key: await unsealed(env, id, record) };
  } catch (error) {
    console.error(`key ${id}: ${error.message}`);
    return {};
  }
}

/** The stream and the bytes of `1:{cipher}:{stream}:{nonce}:{ciphertext}:{tag}`; throws what is wrong with it. */
async function unsealed(env, id, record) {
  for (const name of ["EDGE_ENCRYPTION_KEY", "EDGE_MAC_KEY"]) {
    if (!SECRET.test(env[name] ?? "")) throw new Error(`the secret ${name} is missing, or not 64 hex digits`);
  }
  const end = record.lastIndexOf(":");
  const head = record.slice(0, Math.max(end, 0));
  // Nothing is read of a record before its tag is right: it covers the key's ID too, so that none can be moved.
  if (!(await isMac(env.EDGE_MAC_KEY, `${id}:${head}`, record.slice(end + 1)))) {
    throw new Error("the sealed key was changed, moved, or sealed under another secret; it is not given out");
  }
  const [version, cipher, stream, nonce, sealed, ...more] = head.split(":");
  const isWhole = version === "1" && STREAM.test(stream) && NONCE.test(nonce) && SEALED.test(sealed);
  if (!isWhole || more.length > 0) throw new Error("the sealed key is of no version that this worker knows");
  return { stream, bytes: await decrypted(env.EDGE_ENCRYPTION_KEY, cipher, nonce, bytesOf(sealed)) };
}

async function decrypted(secret, cipher, nonce, sealed) {
  if (cipher === "ctr") {
    const key = await crypto.subtle.importKey("raw", bytesOf(secret), "AES-CTR", false, ["decrypt"]);
    const algorithm = { name: "AES-CTR", counter: bytesOf(nonce), length: 128 };
    return new Uint8Array(await crypto.subtle.decrypt(algorithm, key, sealed));
  }
  if (cipher === "hmac") {
    const stream = await hmac(secret, nonce);
    return sealed.map((byte, at) => byte ^ stream[at]);
  }
  throw new Error("the sealed key is under a cipher that this worker does not know");
}

/**
 * What a token is good for: a stream ID or `*`; null if it is none of this service's, or has run out. A token is
 * `{seconds since 1970}~{scope}~{MAC}`.
 */
async function scopeOfToken(env, token) {
  const [expires, scope, mac, ...more] = (token ?? "").split("~");
  const isWhole = /^[0-9]{1,12}$/.test(expires) && (scope === "*" || STREAM.test(scope ?? "")) && more.length === 0;
  if (!isWhole || !(await isMac(env.EDGE_TOKEN_KEY, `${expires}~${scope}`, mac))) return null;
  return Number(expires) * 1000 > Date.now() ? scope : null;
}

/** HMAC-SHA-256 under a key that is text. */
async function hmac(key, text) {
  return new Uint8Array(await crypto.subtle.sign("HMAC", await hmacKey(key, "sign"), encoded(text)));
}

/** Whether hex digits are the MAC of a text. `verify` takes the same time wherever they differ. */
async function isMac(key, text, mac) {
  if (!MAC.test(mac ?? "")) return false;
  return crypto.subtle.verify("HMAC", await hmacKey(key, "verify"), bytesOf(mac), encoded(text));
}

function hmacKey(key, use) {
  return crypto.subtle.importKey("raw", encoded(key), { name: "HMAC", hash: "SHA-256" }, false, [use]);
}

function encoded(text) {
  return new TextEncoder().encode(text);
}

function bytesOf(hex) {
  return Uint8Array.from(hex.match(/../g), (digits) => parseInt(digits, 16));
}

function hexOf(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function forbidden(request, env, detail) {
  return problem(request, env, 403, "Forbidden", detail);
}

/** RFC 9457, as the shield writes it. */
function problem(request, env, status, title, detail, headers = {}) {
  const body = JSON.stringify({ detail, status, title, type: "about:blank" });
  const about = { "Content-Type": "application/problem+json", "Cache-Control": "no-store", ...headers };
  return reply(request, env, status, body, about);
}

/** The answer to a CORS preflight. */
function preflight(request, env) {
  const headers = new Headers({
    "Access-Control-Allow-Methods": ALLOWED_METHODS,
    "Access-Control-Allow-Headers": "*, Authorization, Range",
    "Access-Control-Max-Age": "86400",
  });
  addCors(request, env, headers);
  return new Response(null, { status: 204, headers });
}

function reply(request, env, status, body, about) {
  const bytes = typeof body === "string" ? encoded(body) : body;
  const headers = new Headers({ ...about, "Keyshield-Served-By": "edge", "Content-Length": String(bytes.length) });
  addCors(request, env, headers);
  return new Response(request.method === "HEAD" ? null : bytes, { status, headers });
}

/** On every answer, whatever was asked, so that no cache can keep one without them. */
function addCors(request, env, headers) {
  const allowed = (env.CORS_ORIGINS ?? "*").split(",").map((origin) => origin.trim());
  if (allowed.includes("*")) {
    headers.set("Access-Control-Allow-Origin", "*");
  } else {
    headers.append("Vary", "origin");
    const origin = request.headers.get("Origin");
    if (!allowed.includes(origin)) return;
    headers.set("Access-Control-Allow-Origin", origin);
  }
  headers.set("Access-Control-Expose-Headers", EXPOSED);
}
