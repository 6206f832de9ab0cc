// Gives content keys out of a KeyValueStore: a viewer-request function for CloudFront (runtime cloudfront-js-2.0).
//
// The store holds keys sealed (src/keys/edge.rs of keyshield); whoever may list it or reads its logs sees nothing. What
// opens them stands here and not in the store, where it would lie beside what it opens: a function has no other place
// for a secret. So this code, filled in, is a secret: reading it takes cloudfront:GetFunction, which is granted apart.
// `keyshield cdn deploy` fills it in.
//
// A key that is not in the store, or does not verify, is the origin's to answer, as is every other path.
// The language has no for-of, no destructuring and no AES; binary is handled as hex.

import cf from 'cloudfront';
import crypto from 'crypto';

const ENCRYPTION_KEY = '__ENCRYPTION_KEY__';
const MAC_KEY = '__MAC_KEY__';
// Empty: keys are given without a token.
const TOKEN_KEY = '__TOKEN_KEY__';
// What stands before key IDs, besides the second, at which the shield answers always.
const KEY_PATHS = ['__KEY_PATH__', '/api/hls/keys/'];
// For how many seconds a player may keep a key.
const MAX_AGE = '__MAX_AGE__';
// Origins whose scripts may read answers, separated by commas; * for all.
const CORS_ORIGINS = '__CORS_ORIGINS__';

const METHODS = 'GET, HEAD, OPTIONS';
const EXPOSED = 'Accept-Ranges, Age, Content-Length, Content-Range, ETag';
const REASONS = { '200': 'OK', '204': 'No Content', '403': 'Forbidden', '404': 'Not Found', '405': 'Method Not Allowed' };

function hmac(key, text) {
    return crypto.createHmac('sha256', key).update(text).digest('hex');
}

// Takes as long for any two texts of one length.
function isEqual(a, b) {
    if (a.length !== b.length) {
        return false;
    }
    let differs = 0;
    for (let i = 0; i < a.length; i++) {
        differs |= a.charCodeAt(i) ^ b.charCodeAt(i);
    }
    return differs === 0;
}

function xor(a, b) {
    let hex = '';
    for (let i = 0; i < a.length; i += 2) {
        const byte = parseInt(a.slice(i, i + 2), 16) ^ parseInt(b.slice(i, i + 2), 16);
        hex += (byte < 16 ? '0' : '') + byte.toString(16);
    }
    return hex;
}

// 1:hmac:{stream}:{nonce}:{ciphertext}:{tag}; null for what was not sealed for this key ID.
function open(id, record) {
    const at = record.lastIndexOf(':');
    const head = record.slice(0, Math.max(at, 0));
    if (!isEqual(hmac(MAC_KEY, id + ':' + head), record.slice(at + 1))) {
        return null;
    }
    const parts = head.split(':');
    if (parts.length !== 5 || parts[0] !== '1' || parts[1] !== 'hmac' || parts[4].length > 64) {
        return null;
    }
    return { stream: parts[2], key: xor(parts[4], hmac(ENCRYPTION_KEY, parts[3])) };
}

async function read(id) {
    try {
        return open(id, await cf.kvs().get(id));
    } catch (_) {
        // It throws for a key that is not there.
        return null;
    }
}

function tokenOf(request) {
    try {
        return decodeURIComponent(request.querystring.token.value);
    } catch (_) {
        return '';
    }
}

// {expires}~{stream or *}~{mac}: what the token is for, or null.
function scopeOf(token) {
    const parts = token.split('~');
    if (parts.length !== 3 || !/^[0-9]{1,15}$/.test(parts[0])) {
        return null;
    }
    const isOurs = isEqual(hmac(TOKEN_KEY, parts[0] + '~' + parts[1]), parts[2]);
    return isOurs && Number(parts[0]) * 1000 > Date.now() ? parts[1] : null;
}

// As the shield: the same for everybody, or by the request's origin.
function addCors(request, headers) {
    const allowed = CORS_ORIGINS.split(',');
    let origin = '*';
    if (allowed.indexOf('*') < 0) {
        headers.vary = { value: 'origin' };
        origin = request.headers.origin ? request.headers.origin.value : '';
        if (allowed.indexOf(origin) < 0) {
            return;
        }
    }
    headers['access-control-allow-origin'] = { value: origin };
    headers['access-control-expose-headers'] = { value: EXPOSED };
}

function answer(request, status, headers, body) {
    const all = { 'keyshield-served-by': { value: 'edge' } };
    addCors(request, all);
    Object.keys(headers).forEach((name) => { all[name] = { value: headers[name] }; });
    const response = { statusCode: status, statusDescription: REASONS[status], headers: all };
    if (body && request.method !== 'HEAD') {
        response.body = body;
    }
    return response;
}

function problem(request, status, detail) {
    const headers = { 'content-type': 'application/problem+json', 'cache-control': 'no-store' };
    if (status === 405) {
        headers.allow = METHODS;
    }
    const text = JSON.stringify({ type: 'about:blank', title: REASONS[status], status: status, detail: detail });
    return answer(request, status, headers, { encoding: 'text', data: text });
}

async function check(request, id) {
    const record = await read(id);
    if (!record) {
        return problem(request, 404, 'the store at this edge has no such key');
    }
    const value = hmac(record.key, 'keyshield check ' + id).slice(0, 16);
    const headers = { 'content-type': 'text/plain', 'cache-control': 'no-store', 'x-content-type-options': 'nosniff' };
    return answer(request, 200, headers, { encoding: 'text', data: value });
}

function give(request, id, record) {
    const tags = ['keyshield-stream-' + record.stream, 'keyshield-key-' + id];
    const headers = {
        'content-type': 'application/octet-stream',
        'cache-control': 'private, max-age=' + MAX_AGE,
        'x-content-type-options': 'nosniff',
        'surrogate-key': tags.join(' '),
        'cache-tag': tags.join(','),
        'keyshield-key': id,
    };
    const data = Buffer.from(record.key, 'hex').toString('base64');
    return answer(request, 200, headers, { encoding: 'base64', data: data });
}

// What a URI asks for: [, key ID, '/check' or undefined], or null for what is not this function's.
function askedBy(uri) {
    for (let i = 0; i < KEY_PATHS.length; i++) {
        const path = KEY_PATHS[i];
        if (uri.indexOf(path) === 0) {
            return /^([0-9a-f]{32})(\/check)?$/.exec(uri.slice(path.length));
        }
    }
    return null;
}

async function handler(event) {
    const request = event.request;
    const asked = askedBy(request.uri);
    if (!asked) {
        return request;
    }
    const method = request.method;
    if (method === 'OPTIONS') {
        return answer(request, 204, {
            'access-control-allow-methods': METHODS,
            'access-control-allow-headers': '*, Authorization, Range',
            'access-control-max-age': '86400',
        });
    }
    if (method !== 'GET' && method !== 'HEAD') {
        return problem(request, 405, 'only GET, HEAD and OPTIONS are answered here');
    }
    const id = asked[1];
    if (asked[2]) {
        return check(request, id);
    }
    const scope = TOKEN_KEY ? scopeOf(tokenOf(request)) : '*';
    if (scope === null) {
        return problem(request, 403, 'this key is given for a token that is good, and this request has none');
    }
    const record = await read(id);
    if (!record) {
        // Whom the token lets in is settled here, and caches need not know whose it is.
        if (TOKEN_KEY) {
            delete request.querystring.token;
        }
        return request;
    }
    if (scope !== '*' && scope !== record.stream) {
        return problem(request, 403, 'the token is for another stream');
    }
    return give(request, id, record);
}
