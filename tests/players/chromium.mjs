// Plays a stream in headless Chromium and prints what the player saw, as one
// JSON object on stdout:
//
//   node chromium.mjs --url http://127.0.0.1:8080/demo/master.m3u8 --seconds 45
//                     [--player hlsjs|shaka|videojs|native]... [--rate N]
//                     [--low-latency on|off] [--screenshot FILE.png]
//
// Several `--player`s (default: hlsjs) play side by side, each on a page of
// its own in one browser; their objects come one a line, in that order.
// `native` is Chromium's own HLS. `--rate` plays a VOD faster than it is.
// `--low-latency` sets lowLatencyMode of hls.js, which is otherwise its default.
//
// Exit code 0: it could measure, however badly the stream played; the caller
// judges the figures. 2: a bad argument, no Chromium, or no Node packages. 1:
// the browser died or the hard timeout passed. 1 and 2 come with one line on
// stderr.
//
// Why a browser: whether playlists, keys and CORS headers are right is decided
// by players, and a test that decrypts by itself would share our own mistakes.
// One thing a player does not notice: in MPEG-TS a wrong IV garbles the first
// 16 bytes only, and demuxers find the next packet and play on. Bytes have to
// be compared for that, which is done elsewhere.
// The page comes from a server of its own here, so the stream is cross-origin,
// and the system's Chromium is driven by playwright-core, which brings no
// browser along.
//
// Network figures come from the DevTools protocol, not from request
// interception, because interception turns the browser's cache off and the
// cache is part of what is tested: `keyRequests` counts what left the browser.
//
// Deliberately absent: a verdict, retries, and any knowledge of keyshield
// beyond the path of its keys.

import { accessSync, constants, statSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const PLAYERS = ['hlsjs', 'shaka', 'videojs', 'native'];
const USAGE = 'usage: node chromium.mjs --url URL --seconds N ' +
  `[--player ${PLAYERS.join('|')}]... [--rate N] [--low-latency on|off] [--screenshot FILE.png]`;
const KEY_PATH = '/api/hls/keys/';
const MAX_SECONDS = 3600;
const MAX_RATE = 16; // Chromium's own limit
const MAX_TRACKED_KEY_REQUESTS = 10_000;
const HARD_TIMEOUT_MARGIN_SECS = 60;
const CLOSE_TIMEOUT_MS = 10_000;
const SCREENSHOT_TIMEOUT_MS = 10_000;

const CHROMIUM_ARGS = [
  '--no-sandbox', // tests run as root in containers, and play only their own page
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--autoplay-policy=no-user-gesture-required',
];

// The whole of what the page's server serves. A table has no path to climb out of.
const JAVASCRIPT = 'text/javascript; charset=utf-8';
const PAGES = {
  '/': ['page/index.html', 'text/html; charset=utf-8'],
  '/main.js': ['page/main.js', JAVASCRIPT],
  '/library.js': ['page/library.js', JAVASCRIPT],
  ...Object.fromEntries(PLAYERS.map((player) => [`/players/${player}.js`, [`page/players/${player}.js`, JAVASCRIPT]])),
  '/hls.min.js': ['node_modules/hls.js/dist/hls.min.js', JAVASCRIPT],
  '/shaka-player.js': ['node_modules/shaka-player/dist/shaka-player.compiled.js', JAVASCRIPT],
  '/video.js': ['node_modules/video.js/dist/video.min.js', JAVASCRIPT],
};

/** An end with a code of its own and one line for the user. */
class Exit extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

process.exitCode = await main();
// Whatever still lingers must not keep the process: Playwright kills what is
// left of the browser when it exits. The write waits for stdout to be drained.
process.stdout.write('', () => process.exit());

async function main() {
  try {
    const options = parseArguments(process.argv.slice(2));
    if (options.help) {
      console.log(USAGE);
      return 0;
    }
    for (const report of await measureWithin(options)) console.log(JSON.stringify(report));
    return 0;
  } catch (error) {
    const line = String(error?.message ?? error).split('\n')[0];
    console.error(`chromium.mjs: ${line}`);
    return error instanceof Exit ? error.code : 1;
  }
}

function parseArguments(argv) {
  let values;
  try {
    ({ values } = parseArgs({
      args: argv,
      options: {
        url: { type: 'string' },
        seconds: { type: 'string' },
        screenshot: { type: 'string' },
        player: { type: 'string', multiple: true, default: ['hlsjs'] },
        rate: { type: 'string', default: '1' },
        'low-latency': { type: 'string' },
        help: { type: 'boolean', default: false },
      },
    }));
  } catch (error) {
    throw new Exit(2, `${error.message.split('. ')[0]}; ${USAGE}`);
  }
  if (values.help) return { help: true };

  if (values.url === undefined || !isHttpUrl(values.url)) {
    throw new Exit(2, `--url must be an http or https URL; ${USAGE}`);
  }
  const seconds = Number(values.seconds);
  if (!(seconds >= 1 && seconds <= MAX_SECONDS)) {
    throw new Exit(2, `--seconds must be a number from 1 to ${MAX_SECONDS}; ${USAGE}`);
  }
  if (values.screenshot !== undefined && !values.screenshot.endsWith('.png')) {
    throw new Exit(2, `--screenshot must name a .png file; ${USAGE}`);
  }
  const rate = Number(values.rate);
  if (!(rate > 0 && rate <= MAX_RATE)) {
    throw new Exit(2, `--rate must be a number above 0 and up to ${MAX_RATE}; ${USAGE}`);
  }
  const unknown = values.player.find((player) => !PLAYERS.includes(player));
  if (unknown !== undefined) throw new Exit(2, `--player ${unknown} is not known; ${USAGE}`);
  const lowLatency = values['low-latency'];
  if (![undefined, 'on', 'off'].includes(lowLatency)) {
    throw new Exit(2, `--low-latency must be on or off; ${USAGE}`);
  }
  return { ...values, seconds, rate, lowLatency, help: false };
}

function isHttpUrl(text) {
  try {
    return ['http:', 'https:'].includes(new URL(text).protocol);
  } catch {
    return false;
  }
}

/** Runs the measurement under the hard timeout and cleans up in every case. */
async function measureWithin(options) {
  const held = { server: null, browser: null };
  const limitSecs = options.seconds + HARD_TIMEOUT_MARGIN_SECS;
  let timer;
  const timeout = new Promise((_, reject) => {
    timer = setTimeout(
      () => reject(new Exit(1, `no result within the hard timeout of ${limitSecs} s`)),
      limitSecs * 1000,
    );
  });
  try {
    return await Promise.race([measure(options, held), timeout]);
  } finally {
    clearTimeout(timer);
    await release(held);
  }
}

async function release({ server, browser }) {
  const closing = browser?.close().catch(() => {});
  const patience = new Promise((resolve) => setTimeout(resolve, CLOSE_TIMEOUT_MS).unref());
  await Promise.race([closing, patience]);
  server?.closeAllConnections();
  server?.close();
}

async function measure(options, held) {
  const chromium = await loadPlaywright();
  held.server = await servePage();
  held.browser = await launch(chromium);
  return Promise.all(options.player.map((player) => measureOne(player, options, held)));
}

async function measureOne(player, options, { server, browser }) {
  // A context of its own: one player's cache would serve the others.
  const context = await browser.newContext({ viewport: { width: 680, height: 460 } });
  const page = await context.newPage();
  const pageErrors = watchPage(page);
  const network = await watchKeyRequests(page);

  await page.goto(pageUrl(server, player, options), { waitUntil: 'load' });
  // The page keeps the time; the margin is for a machine that is busy.
  await page.waitForFunction(() => window.__report?.done, null, {
    polling: 250,
    timeout: (options.seconds + HARD_TIMEOUT_MARGIN_SECS / 2) * 1000,
  }).catch((error) => {
    throw new Exit(1, `the page of ${player} did not finish: ${pageErrors[0] ?? error.message}`);
  });
  const seen = await page.evaluate(() => window.__report);
  if (options.screenshot !== undefined) await takeScreenshot(page, options.screenshot);
  return reportOf(seen, network, browser.version());
}

async function loadPlaywright() {
  try {
    for (const [path] of Object.values(PAGES)) statSync(fileOf(path));
    return (await import('playwright-core')).chromium;
  } catch {
    throw new Exit(2, 'the Node packages are missing; run scripts/bootstrap.sh test');
  }
}

async function launch(chromium) {
  const executablePath = process.env.CHROMIUM || '/usr/bin/chromium';
  try {
    accessSync(executablePath, constants.X_OK);
  } catch {
    throw new Exit(2, `no Chromium at ${executablePath}; run scripts/bootstrap.sh test, or set CHROMIUM`);
  }
  try {
    // Every launch gets a user-data-dir of its own, removed at its end.
    return await chromium.launch({ executablePath, args: CHROMIUM_ARGS, headless: true });
  } catch (error) {
    throw new Exit(2, `Chromium at ${executablePath} does not start: ${error.message.split('\n')[0]}`);
  }
}

function servePage() {
  const server = createServer(async (request, response) => {
    const entry = PAGES[new URL(request.url, 'http://page').pathname];
    if (request.method !== 'GET' || entry === undefined) {
      response.writeHead(404).end();
      return;
    }
    const [path, type] = entry;
    try {
      const body = await readFile(fileOf(path));
      response.writeHead(200, { 'content-type': type, 'cache-control': 'no-store' }).end(body);
    } catch {
      response.writeHead(500).end();
    }
  });
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(0, '127.0.0.1', () => resolve(server));
  });
}

function pageUrl(server, player, { url, seconds, rate, lowLatency }) {
  const query = new URLSearchParams({ player, url, seconds: String(seconds), rate: String(rate) });
  if (lowLatency !== undefined) query.set('lowLatency', lowLatency);
  return `http://127.0.0.1:${server.address().port}/?${query}`;
}

/** Collects uncaught exceptions: without them, a broken page is only silent. */
function watchPage(page) {
  const messages = [];
  page.on('pageerror', (error) => {
    if (messages.length < 10) messages.push(error.message);
  });
  return messages;
}

/** Follows key requests that leave the browser, and which of them got a key. */
async function watchKeyRequests(page) {
  const seen = { sent: 0, fromCache: 0, delivered: new Set() };
  const urlByRequest = new Map();
  const session = await page.context().newCDPSession(page);
  session.on('Network.requestWillBeSent', ({ requestId, request }) => {
    if (!new URL(request.url).pathname.startsWith(KEY_PATH)) return;
    seen.sent += 1;
    if (urlByRequest.size < MAX_TRACKED_KEY_REQUESTS) urlByRequest.set(requestId, request.url);
  });
  session.on('Network.requestServedFromCache', ({ requestId }) => {
    if (urlByRequest.has(requestId)) seen.fromCache += 1;
  });
  session.on('Network.responseReceived', ({ requestId, response }) => {
    const url = urlByRequest.get(requestId);
    if (url === undefined) return;
    if (response.fromDiskCache) seen.fromCache += 1;
    if (response.status === 200) seen.delivered.add(url);
  });
  await session.send('Network.enable');
  return seen;
}

async function takeScreenshot(page, path) {
  try {
    await page.screenshot({ path, timeout: SCREENSHOT_TIMEOUT_MS });
  } catch (error) {
    // The figures are what was asked for; a missing picture does not void them.
    console.error(`chromium.mjs: no screenshot: ${error.message.split('\n')[0]}`);
  }
}

function reportOf(seen, network, browserVersion) {
  const { done, player, keysLoaded, ...figures } = seen;
  const report = {
    player,
    browser: `Chromium ${browserVersion}`,
    ...figures,
    // A player that tells a page nothing of its keys: the network does.
    keysLoaded: keysLoaded ?? [...network.delivered],
    keyRequests: network.sent - network.fromCache,
  };
  for (const [name, value] of Object.entries(report)) {
    if (typeof value === 'number') report[name] = Math.round(value * 1000) / 1000;
  }
  return report;
}

function fileOf(path) {
  return fileURLToPath(new URL(path, import.meta.url));
}
