// Runs a CloudFront function as CloudFront does, as far as its documentation says what it does: the code as it is
// shipped, in a context that has what cloudfront-js-2.0 has and nothing else, with events and answers of the documented
// shape. Behind it is an origin, and a KeyValueStore that is read where the connector wrote it.
//
// node --experimental-vm-modules function.mjs PORT CODE-FILE STORE-URL ORIGIN-URL
//
// What breaks a rule of CloudFront's is answered 502 (its own would be 503) with the rule that was broken.

import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { createHash, createHmac } from 'node:crypto';
import vm from 'node:vm';

const [port, file, store, origin] = process.argv.slice(2);
const LIMITS = { code: 10_240, answer: 40_000 };
// Edge functions may not set these.
const DISALLOWED = /^(connection|expect|keep-alive|proxy-.*|trailer|upgrade|x-accel-.*|x-amz-cf-.*|x-cache.*|x-edge-.*|x-forwarded-proto|x-real-ip|content-length|transfer-encoding|via|host)$/;

const code = readFileSync(file, 'utf8');
if (Buffer.byteLength(code) > LIMITS.code) {
    throw new Error(`the function is longer than ${LIMITS.code} bytes`);
}

const kvs = () => ({
    async get(key, options) {
        if (typeof key !== 'string' || key === '' || (options && options.format && options.format !== 'string')) {
            throw new Error('a key is a text');
        }
        const answer = await fetch(`${store}/keys/${encodeURIComponent(key)}`);
        if (answer.status !== 200) {
            throw new Error(`KeyNotFound ${key}`);
        }
        return (await answer.json()).Value;
    },
});

// Only what is documented: createHash and createHmac of md5, sha1, sha256, and a digest as text.
const limited = (make) => (name, key) => {
    if (!['md5', 'sha1', 'sha256'].includes(name)) {
        throw new Error(`no ${name}`);
    }
    const made = make(name, key);
    const facade = {
        update(data) {
            made.update(data);
            return facade;
        },
        digest(encoding) {
            if (!['hex', 'base64', 'base64url'].includes(encoding)) {
                throw new Error('a digest is hex, base64 or base64url');
            }
            return made.digest(encoding);
        },
    };
    return facade;
};
const crypto = { createHash: limited(createHash), createHmac: limited(createHmac) };

const context = vm.createContext(
    { Buffer, console: { log() {} } },
    { codeGeneration: { strings: false, wasm: false } },
);
for (const name of ['WebAssembly', 'SharedArrayBuffer', 'Atomics', 'eval', 'Function']) {
    vm.runInContext(`delete globalThis.${name}`, context);
}
const modules = { cloudfront: { kvs }, crypto };
// A function's handler is found by its name; a module's has to be let out.
const main = new vm.SourceTextModule(`${code}\nexport { handler };\n`, { context });
await main.link((name) => {
    if (!modules[name]) {
        throw new Error(`there is no module ${name}`);
    }
    return new vm.SyntheticModule(['default'], function () { this.setExport('default', modules[name]); }, { context });
});
await main.evaluate();

function multi(pairs) {
    const fields = {};
    for (const [name, value] of pairs) {
        if (fields[name]) {
            fields[name].multiValue = [...(fields[name].multiValue ?? [{ value: fields[name].value }]), { value }];
        } else {
            fields[name] = { value };
        }
    }
    return fields;
}

function eventOf(message) {
    const [uri, query] = message.url.split('?');
    const pairs = (query ?? '').split('&').filter(Boolean).map((pair) => {
        const [name, ...value] = pair.split('=');
        return [name, value.join('=')];
    });
    const headers = Object.entries(message.headers).filter(([name]) => name !== 'cookie');
    const cookies = (message.headers.cookie ?? '').split('; ').filter(Boolean).map((pair) => pair.split('='));
    return {
        version: '1.0',
        context: {
            distributionDomainName: 'd111111abcdef8.cloudfront.net',
            distributionId: 'EDFDVBD6EXAMPLE',
            eventType: 'viewer-request',
            requestId: 'EXAMPLEntjQpEXAMPLE_SG5Z-EXAMPLEPmPfEXAMPLEu3EqEXAMPLE==',
        },
        viewer: { ip: '198.51.100.11' },
        request: { method: message.method, uri, querystring: multi(pairs), headers: multi(headers), cookies: multi(cookies) },
    };
}

function check(rule, isKept) {
    if (!isKept) {
        throw new Error(rule);
    }
}

function checked(answer, method) {
    const known = ['statusCode', 'statusDescription', 'headers', 'cookies', 'body'];
    check('an answer has documented fields only', Object.keys(answer).every((name) => known.includes(name)));
    check('a status is a number', Number.isInteger(answer.statusCode) && answer.statusCode >= 200 && answer.statusCode < 600);
    for (const [name, field] of Object.entries(answer.headers ?? {})) {
        check(`${name} is lower case`, /^[a-z0-9-]+$/.test(name));
        check(`${name} may be set by a function`, !DISALLOWED.test(name));
        check(`${name} has a text`, typeof field.value === 'string' && !/[\r\n]/.test(field.value));
    }
    if (answer.body !== undefined) {
        check('HEAD has no body', method !== 'HEAD');
        check('a body says how it is written', ['text', 'base64'].includes(answer.body.encoding));
        check('a body is a text', typeof answer.body.data === 'string');
    }
    check('an answer is short enough', JSON.stringify(answer).length <= LIMITS.answer);
    return answer;
}

async function onTo(request, event, response) {
    check('the method is not changed', request.method === event.request.method);
    const query = Object.entries(request.querystring).flatMap(([name, field]) =>
        (field.multiValue ?? [field]).map(({ value }) => `${name}=${value}`));
    const url = origin + request.uri + (query.length ? `?${query.join('&')}` : '');
    const answer = await fetch(url, { method: request.method });
    const headers = Object.fromEntries([...answer.headers].filter(([name]) => !/^(connection|keep-alive|content-length|transfer-encoding)$/.test(name)));
    response.writeHead(answer.status, headers).end(Buffer.from(await answer.arrayBuffer()));
}

async function serve(message, response) {
    const event = eventOf(message);
    const method = message.method;
    const given = await main.namespace.handler(event);
    if (given && given.statusCode === undefined && given.uri !== undefined) {
        return onTo(given, { request: { method } }, response);
    }
    const answer = checked(given, method);
    const headers = Object.fromEntries(Object.entries(answer.headers ?? {}).map(([name, { value }]) => [name, value]));
    const { encoding, data } = answer.body ?? { encoding: 'text', data: '' };
    response.writeHead(answer.statusCode, headers).end(Buffer.from(data, encoding === 'text' ? 'utf8' : 'base64'));
}

createServer((message, response) => {
    if (message.url === '/_ready') {
        response.end('ready');
        return;
    }
    serve(message, response).catch((error) => response.writeHead(502).end(String(error.stack ?? error)));
}).listen(Number(port), '127.0.0.1');
