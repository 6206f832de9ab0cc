// Plays the stream named in the page's query and keeps a record of it in
// window.__report, which chromium.mjs reads once `done` is true.
//
//   ?player=…    a file of players/: hlsjs, shaka, videojs or native
//   &url=…       the playlist
//   &seconds=…   wall time to play for; a VOD that ends earlier ends the test
//   &rate=…      the playback rate
//   &lowLatency=on|off  the player's low-latency mode, in place of its default
//
// The page only counts; what a figure means is for the caller to say. Every
// list has a bound, every counter goes on past it.
//
// A player is a module with two functions: `load()`, which brings its library
// and gives its name with its version, and `play(video, url, watch)`, which
// starts it and reports to `watch`. Playhead, frames and sound are measured
// here, at the media element, and so by one measure for all of them.
//
// Deliberately absent: recovery (recoverMediaError, startLoad, reloading the
// page). A fatal error is a finding, and the end of the test.

const SAMPLE_MS = 200;
const MAX_ERRORS = 100;
const MAX_DISTINCT = 10_000;
const MAX_REASON_CHARS = 300;

// A playhead that gains more than this on the clock between two samples was
// moved (start at the live edge, a skipped gap), it did not play.
const JUMP_SECONDS = 0.5;

// A playhead this near to the end, and still, has played everything: some
// players leave out the last event when audio and video differ in length.
const END_SECONDS = 0.25;

// A fatal error is rarely alone; what else comes of it is worth waiting for.
const AFTERMATH_SECONDS = 0.5;

const query = new URLSearchParams(location.search);
const url = query.get('url');
const seconds = Number(query.get('seconds'));
const rate = Number(query.get('rate'));

/** What the player thinks it is behind the live edge, in seconds; 0 when it does not know. */
let latencyNow = () => 0;
const latency = { sum: 0, samples: 0 };

const video = document.getElementById('video');
const startedAt = performance.now();

const report = {
  done: false,
  player: query.get('player'),
  seconds: 0,
  startupSeconds: null,
  currentTimeStart: null,
  currentTimeEnd: 0,
  played: 0,
  stalledSeconds: 0,
  ended: false,
  errors: [],
  fatalErrors: 0,
  // What a player does not tell a page stays null.
  decryptErrors: null,
  keysLoaded: null,
  fragmentsLoaded: null,
  fragmentsDecrypted: null,
  partsLoaded: null,
  levelsSeen: null,
  // Behind the live edge: the mean of all samples since playback began.
  latencySeconds: null,
  decodedFrames: 0,
  decodedAudioBytes: 0,
  cues: 0,
};
window.__report = report;

const watch = {
  report,
  record,
  /** A set that shows up in the report as a list, or as a count. */
  list: (field) => bounded((set) => { report[field] = [...set]; }),
  count: (field) => bounded((set) => { report[field] = set.size; }),
  /** Where the subtitles are; a player that draws them itself has tracks of its own. */
  textTracks: () => video.textTracks,
  lowLatency: query.get('lowLatency'),
  /** Takes the function by which a player says how far behind the live edge it is. */
  measureLatency: (measure) => { latencyNow = measure; },
  /** Playing is everybody's own to begin: when there is something to play. */
  begin,
};

try {
  const player = await import(`/players/${report.player}.js`);
  report.player = await player.load();
  watchPlayhead();
  player.play(video, url, watch);
} catch (error) {
  record({ type: 'otherError', details: 'pageError', fatal: true, error });
  report.done = true;
}

function begin() {
  video.playbackRate = rate;
  video.play().catch((error) => {
    // A failed load ends the promise too; the error event tells that better.
    if (error.name === 'NotAllowedError') {
      record({ type: 'otherError', details: 'playNotAllowed', fatal: true, error });
    }
  });
}

/** Counts played and stalled time, and ends the test when its time is up. */
function watchPlayhead() {
  let lastWall = performance.now();
  let lastTime = 0;
  let fatalAt = null;
  const timer = setInterval(() => {
    const wall = performance.now();
    const elapsed = (wall - lastWall) / 1000;
    const moved = video.currentTime - lastTime;
    const isSmooth = moved > 0 && moved <= elapsed * rate + JUMP_SECONDS;
    const hasEnded = video.ended || (moved === 0 && isAtEnd());
    lastWall = wall;
    lastTime = video.currentTime;

    if (report.currentTimeStart === null) {
      // What is decoded, not the playhead, says that playback began: a live
      // stream puts the playhead at the live edge long before there is
      // anything to show.
      if (framesDecoded() + audioBytesDecoded() > 0 && !video.seeking && isSmooth) {
        report.currentTimeStart = video.currentTime - moved;
        report.played = moved;
        report.startupSeconds = (wall - startedAt) / 1000;
      }
    } else if (isSmooth) {
      report.played += moved;
    } else if (moved === 0 && !hasEnded) {
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
    report.decodedAudioBytes = audioBytesDecoded();
    report.cues = Math.max(report.cues, cuesLoaded());
    report.ended = hasEnded;
    showStatus();
    if (report.fatalErrors > 0) fatalAt ??= wall;
    const isOver = fatalAt !== null && wall - fatalAt >= AFTERMATH_SECONDS * 1000;
    if (report.ended || isOver || report.seconds >= seconds) {
      clearInterval(timer);
      report.done = true;
    }
  }, SAMPLE_MS);
}

function isAtEnd() {
  return report.currentTimeStart !== null && video.duration - video.currentTime < END_SECONDS;
}

function framesDecoded() {
  return video.getVideoPlaybackQuality().totalVideoFrames;
}

function audioBytesDecoded() {
  return video.webkitAudioDecodedByteCount ?? 0;
}

function cuesLoaded() {
  let cues = 0;
  for (const track of watch.textTracks()) {
    if (['subtitles', 'captions'].includes(track.kind)) cues += track.cues?.length ?? 0;
  }
  return cues;
}

function record({ type, details, fatal, reason, error }) {
  if (fatal) report.fatalErrors += 1;
  if (report.errors.length < MAX_ERRORS) {
    // A player may give a short reason and put what happened into the error.
    const texts = new Set([reason, error?.message].filter(Boolean));
    const text = [...texts].join(': ').slice(0, MAX_REASON_CHARS);
    report.errors.push({ type, details, fatal: Boolean(fatal), reason: text });
  }
}

/** Gives a function that adds a value, and calls `changed` when it was new and there was room for it. */
function bounded(changed) {
  const set = new Set();
  changed(set);
  return (value) => {
    if (set.has(value) || set.size >= MAX_DISTINCT) return;
    set.add(value);
    changed(set);
  };
}

function showStatus() {
  const keys = report.keysLoaded ? `, ${report.keysLoaded.length} keys` : '';
  document.getElementById('status').textContent =
    `${report.player} | playhead ${report.currentTimeEnd.toFixed(1)} s, ` +
    `played ${report.played.toFixed(1)} s, stalled ${report.stalledSeconds.toFixed(1)} s, ` +
    `${report.decodedFrames} frames${keys}, ${report.errors.length} errors | ${url}`;
}
