// Shaka Player, as shipped. It decrypts by WebCrypto, and so only in a secure
// context, which http on a loopback address is.

import { loadLibrary } from '/library.js';

export async function load() {
  await loadLibrary('/shaka-player.js');
  shaka.polyfill.installAll();
  return `Shaka Player ${shaka.Player.version.replace(/^v/, '')}`;
}

export async function play(video, url, { record, list, begin }) {
  if (!shaka.Player.isBrowserSupported()) {
    record({ type: 'otherError', details: 'mediaSourceUnsupported', fatal: true });
    return;
  }
  const player = new shaka.Player();
  const addKey = list('keysLoaded');
  const note = (error) => record({
    type: nameOf(shaka.util.Error.Category, error.category),
    details: nameOf(shaka.util.Error.Code, error.code),
    fatal: error.severity !== shaka.util.Error.Severity.RECOVERABLE,
    reason: (error.data ?? []).filter((datum) => ['string', 'number'].includes(typeof datum)).join(', '),
    error,
  });
  player.addEventListener('error', ({ detail }) => note(detail));
  player.getNetworkingEngine().registerResponseFilter((type, response) => {
    if (type === shaka.net.NetworkingEngine.RequestType.KEY) addKey(response.uri);
  });
  try {
    await player.attach(video);
    await player.load(url);
  } catch (error) {
    note(error);
    return;
  }
  const [subtitles] = player.getTextTracks();
  if (subtitles !== undefined) player.selectTextTrack(subtitles);
  begin();
}

function nameOf(names, value) {
  return Object.keys(names).find((name) => names[name] === value) ?? String(value);
}
