// video.js, whose http-streaming (VHS) plays HLS. Left alone it would hand the
// stream to Chromium's own HLS; `overrideNative` keeps it for VHS.
//
// VHS tries a playlist that fails again and again and says so only in its log:
// what it warns of is reported as errors that are not fatal, until it has
// warned so often that nothing will come of it.

import { loadLibrary } from '/library.js';

const MAX_WARNINGS = 5;
const SUBTITLES_POLL_MS = 50;

export async function load() {
  await loadLibrary('/video.js');
  return `video.js ${videojs.VERSION}`;
}

export function play(video, url, watch) {
  const { record, begin } = watch;
  let warnings = 0;
  videojs.log.level('warn');
  for (const level of ['warn', 'error']) {
    const write = console[level].bind(console);
    console[level] = (...args) => {
      warnings += 1;
      record({ type: 'log', details: level, fatal: warnings === MAX_WARNINGS, reason: args.map(String).join(' ') });
      write(...args);
    };
  }
  const player = videojs(video, { html5: { vhs: { overrideNative: true }, nativeTextTracks: false } });
  // A list that cannot be iterated.
  watch.textTracks = () => Array.from(player.textTracks());
  player.on('error', () => {
    const { code, message } = player.error();
    record({ type: 'videoJsError', details: `code${code}`, fatal: true, reason: message });
  });
  player.on('loadedmetadata', () => {
    const subtitles = watch.textTracks().filter((track) => track.kind === 'subtitles');
    for (const track of subtitles) track.mode = 'showing';
    beginWithSubtitles(subtitles, begin);
  });
  player.src({ src: url, type: 'application/vnd.apple.mpegurl' });
  // A live stream loads nothing before.
  player.ready(() => player.play().catch(() => {}));
}

/**
 * Goes over to the rate that is asked for when the first subtitles are there: they are loaded from the playhead on, and
 * those that a fast one had passed by then would be missing.
 */
function beginWithSubtitles(tracks, begin) {
  if (tracks.every((track) => track.cues?.length > 0)) begin();
  else setTimeout(beginWithSubtitles, SUBTITLES_POLL_MS, tracks, begin);
}
