// Plays the stream named in the page's query and keeps a record of it in
// window.__report, which hlsjs.mjs reads once `done` is true.
//
//   ?url=…       the playlist
//   &seconds=…   wall time to play for; a VOD that ends earlier ends the test
//   &native=1    the browser's own HLS in place of hls.js
//   &lowLatency=on|off  lowLatencyMode of hls.js, in place of its default
//
// The page only counts; what a figure means is for the caller to say. Every
// list has a bound, every counter goes on past it.
//
// hls.js runs as shipped but for one setting, and what the query sets. By
// default it answers a failed WebCrypto decryption by decrypting once more in
// JavaScript, without looking at the padding, and hands on whatever comes out.
// `enableSoftwareAES: false`
// takes that second chance away: a wrong key or a wrong last block is then an
// error that says so, not noise that some demuxer may or may not stumble on.
//
// Deliberately absent: recovery (recoverMediaError, startLoad, reloading the
// page). A fatal error is a finding.

const SAMPLE_MS = 200;
const MAX_ERRORS = 100;
const MAX_DISTINCT = 10_000;
const MAX_REASON_CHARS = 300;

// A playhead that gains more than this on the clock between two samples was
// moved (start at the live edge, a skipped gap), it did not play.
const JUMP_SECONDS = 0.5;

// What hls.js says when it could not get or use a key. A wrong key shows up as
// `fragParsingError` on an encrypted fragment: media segments are decrypted in
// the transmuxer, which has no error of its own for it.
const KEY_ERROR = /^(fragDecryptError|keyLoad|keySystem)/;

const query = new URLSearchParams(location.search);
const url = query.get('url');
const seconds = Number(query.get('seconds'));
const native = query.get('native') === '1';
const lowLatency = query.get('lowLatency');

const video = document.getElementById('video');
const startedAt = performance.now();

/** What the player thinks it is behind the live edge, in seconds; 0 when it does not know. */
let latencyNow = () => 0;
const latency = { sum: 0, samples: 0 };

const report = {
  done: false,
  player: native ? 'native HLS' : `hls.js ${Hls.version}`,
  seconds: 0,
  startupSeconds: null,
  currentTimeStart: null,
  currentTimeEnd: 0,
  played: 0,
  stalledSeconds: 0,
  ended: false,
  errors: [],
  fatalErrors: 0,
  decryptErrors: native ? null : 0,
  keysLoaded: native ? null : [],
  fragmentsLoaded: native ? null : 0,
  fragmentsDecrypted: native ? null : 0,
  partsLoaded: native ? null : 0,
  // Behind the live edge: the mean of all samples since playback began.
  latencySeconds: null,
  levelsSeen: native ? null : [],
  decodedFrames: 0,
};
window.__report = report;

watchPlayhead();
if (native) {
  playNatively();
} else {
  playWithHlsJs();
}

function playWithHlsJs() {
  if (!Hls.isSupported()) {
    record({ type: 'otherError', details: 'mediaSourceUnsupported', fatal: true });
    return;
  }
  const chosen = lowLatency === null ? {} : { lowLatencyMode: lowLatency === 'on' };
  const hls = new Hls({ enableSoftwareAES: false, ...chosen });
  latencyNow = () => hls.latency;
  const loaded = new Set();
  const parts = new Set();
  const decrypted = new Set();
  const keys = new Set();
  const levels = new Set();

  hls.on(Hls.Events.ERROR, (_, data) => {
    record(data);
    if (isDecryptError(data)) report.decryptErrors += 1;
  });
  hls.on(Hls.Events.KEY_LOADED, (_, { keyInfo }) => {
    if (addBounded(keys, keyInfo.decryptdata.uri)) report.keysLoaded = [...keys];
  });
  hls.on(Hls.Events.LEVEL_SWITCHED, (_, { level }) => {
    if (addBounded(levels, level)) report.levelsSeen = [...levels];
  });
  hls.on(Hls.Events.FRAG_LOADED, (_, { frag, part }) => {
    if (part && addBounded(parts, `${nameOf(frag)} ${part.index}`)) report.partsLoaded = parts.size;
    // Parts of one segment arrive as several events and are one fragment here.
    if (frag.sn !== 'initSegment' && addBounded(loaded, nameOf(frag))) {
      report.fragmentsLoaded = loaded.size;
    }
  });
  // FRAG_DECRYPTED is sent for initialization sections only. That an encrypted
  // fragment reached the source buffer says as much: with the second chance
  // off, nothing but its plaintext could have been transmuxed.
  hls.on(Hls.Events.FRAG_BUFFERED, (_, { frag }) => {
    if (frag.sn !== 'initSegment' && frag.encrypted && addBounded(decrypted, nameOf(frag))) {
      report.fragmentsDecrypted = decrypted.size;
    }
  });
  hls.on(Hls.Events.MEDIA_ATTACHED, () => hls.loadSource(url));
  hls.on(Hls.Events.MANIFEST_PARSED, play);
  hls.attachMedia(video);
}

function playNatively() {
  video.crossOrigin = 'anonymous';
  video.src = url;
  play();
}

function play() {
  video.play().catch((error) => {
    // A failed load ends the promise too; the error event tells that better.
    if (error.name === 'NotAllowedError') {
      record({ type: 'otherError', details: 'playNotAllowed', fatal: true, error });
    }
  });
}

/** Counts played and stalled time, and ends the test when its time is up. */
function watchPlayhead() {
  video.addEventListener('error', () => {
    const { code, message } = video.error;
    const details = ['', 'aborted', 'network', 'decode', 'srcNotSupported'][code] ?? `code${code}`;
    // Under hls.js this is reported by hls.js as well, which knows more of it.
    if (native) record({ type: 'mediaElementError', details, fatal: true, reason: message });
  });

  let lastWall = performance.now();
  let lastTime = 0;
  const timer = setInterval(() => {
    const wall = performance.now();
    const elapsed = (wall - lastWall) / 1000;
    const moved = video.currentTime - lastTime;
    lastWall = wall;
    lastTime = video.currentTime;

    if (report.currentTimeStart === null) {
      // Frames, not the playhead, say that playback began: a live stream puts
      // the playhead at the live edge long before there is anything to show.
      if (framesDecoded() > 0 && !video.seeking && moved > 0 && moved <= elapsed + JUMP_SECONDS) {
        report.currentTimeStart = video.currentTime;
        report.startupSeconds = (wall - startedAt) / 1000;
      }
    } else if (moved > 0 && moved <= elapsed + JUMP_SECONDS) {
      report.played += moved;
    } else if (moved === 0 && !video.ended) {
      report.stalledSeconds += elapsed;
    }

    if (report.currentTimeStart !== null && latencyNow() > 0) {
      latency.sum += latencyNow();
      latency.samples += 1;
      report.latencySeconds = latency.sum / latency.samples;
    }

    report.seconds = (wall - startedAt) / 1000;
    report.currentTimeEnd = video.currentTime;
    report.decodedFrames = framesDecoded();
    report.ended = video.ended;
    showStatus();
    if (report.ended || report.seconds >= seconds) {
      clearInterval(timer);
      report.done = true;
    }
  }, SAMPLE_MS);
}

function framesDecoded() {
  return video.getVideoPlaybackQuality().totalVideoFrames;
}

function record({ type, details, fatal, reason, error }) {
  if (fatal) report.fatalErrors += 1;
  if (report.errors.length < MAX_ERRORS) {
    // hls.js may give a short reason and put what happened into the error.
    const texts = new Set([reason, error?.message].filter(Boolean));
    const text = [...texts].join(': ').slice(0, MAX_REASON_CHARS);
    report.errors.push({ type, details, fatal: Boolean(fatal), reason: text });
  }
}

function isDecryptError({ details, frag }) {
  return KEY_ERROR.test(details) || (details === 'fragParsingError' && Boolean(frag?.encrypted));
}

function nameOf(frag) {
  return `${frag.type} ${frag.level} ${frag.cc} ${frag.sn}`;
}

/** True when the value is new and there was room for it. */
function addBounded(set, value) {
  if (set.has(value) || set.size >= MAX_DISTINCT) return false;
  set.add(value);
  return true;
}

function showStatus() {
  const keys = report.keysLoaded ? `, ${report.keysLoaded.length} keys` : '';
  document.getElementById('status').textContent =
    `${report.player} | playhead ${report.currentTimeEnd.toFixed(1)} s, ` +
    `played ${report.played.toFixed(1)} s, stalled ${report.stalledSeconds.toFixed(1)} s, ` +
    `${report.decodedFrames} frames${keys}, ${report.errors.length} errors | ${url}`;
}
