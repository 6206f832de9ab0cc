// Chromium's own HLS. It tells a page nothing of keys and segments.

export async function load() {
  return 'native HLS';
}

export function play(video, url, { record, begin }) {
  video.addEventListener('error', () => {
    const { code, message } = video.error;
    const details = ['', 'aborted', 'network', 'decode', 'srcNotSupported'][code] ?? `code${code}`;
    record({ type: 'mediaElementError', details, fatal: true, reason: message });
  });
  video.crossOrigin = 'anonymous';
  video.src = url;
  begin();
}
