// hls.js, as shipped but for one setting, and what the page is told. By default it answers a failed
// WebCrypto decryption by decrypting once more in JavaScript, without looking
// at the padding, and hands on whatever comes out. `enableSoftwareAES: false`
// takes that second chance away: a wrong key or a wrong last block is then an
// error that says so, not noise that some demuxer may or may not stumble on.

import { loadLibrary } from '/library.js';

// What hls.js says when it could not get or use a key. A wrong key shows up as
// `fragParsingError` on an encrypted fragment: media segments are decrypted in
// the transmuxer, which has no error of its own for it.
const KEY_ERROR = /^(fragDecryptError|keyLoad|keySystem)/;

export async function load() {
  await loadLibrary('/hls.min.js');
  return `hls.js ${Hls.version}`;
}

export function play(video, url, { report, record, list, count, begin, lowLatency, measureLatency }) {
  if (!Hls.isSupported()) {
    record({ type: 'otherError', details: 'mediaSourceUnsupported', fatal: true });
    return;
  }
  const chosen = lowLatency === null ? {} : { lowLatencyMode: lowLatency === 'on' };
  const hls = new Hls({ enableSoftwareAES: false, ...chosen });
  measureLatency(() => hls.latency);
  const addKey = list('keysLoaded');
  const addLevel = list('levelsSeen');
  const addLoaded = count('fragmentsLoaded');
  const addDecrypted = count('fragmentsDecrypted');
  const addPart = count('partsLoaded');
  report.decryptErrors = 0;

  hls.on(Hls.Events.ERROR, (_, data) => {
    record(data);
    if (isDecryptError(data)) report.decryptErrors += 1;
  });
  hls.on(Hls.Events.KEY_LOADED, (_, { keyInfo }) => addKey(keyInfo.decryptdata.uri));
  hls.on(Hls.Events.LEVEL_SWITCHED, (_, { level }) => addLevel(level));
  hls.on(Hls.Events.FRAG_LOADED, (_, { frag, part }) => {
    if (part) addPart(`${nameOf(frag)} ${part.index}`);
    // Parts of one segment arrive as several events and are one fragment here.
    if (frag.sn !== 'initSegment') addLoaded(nameOf(frag));
  });
  // FRAG_DECRYPTED is sent for initialization sections only. That an encrypted
  // fragment reached the source buffer says as much: with the second chance
  // off, nothing but its plaintext could have been transmuxed.
  hls.on(Hls.Events.FRAG_BUFFERED, (_, { frag }) => {
    if (frag.sn !== 'initSegment' && frag.encrypted) addDecrypted(nameOf(frag));
  });
  hls.on(Hls.Events.MEDIA_ATTACHED, () => hls.loadSource(url));
  hls.on(Hls.Events.MANIFEST_PARSED, begin);
  // Before that there is no track for it to switch on.
  hls.once(Hls.Events.FRAG_BUFFERED, () => { hls.subtitleTrack = hls.subtitleTracks.length - 1; });
  hls.attachMedia(video);
}

function isDecryptError({ details, frag }) {
  return KEY_ERROR.test(details) || (details === 'fragParsingError' && Boolean(frag?.encrypted));
}

function nameOf(frag) {
  return `${frag.type} ${frag.level} ${frag.cc} ${frag.sn}`;
}
