// Loads a player's library, a classic script as its package ships it.

export function loadLibrary(src) {
  return new Promise((resolve, reject) => {
    const script = document.createElement('script');
    script.src = src;
    script.onload = () => resolve();
    script.onerror = () => reject(new Error(`${src} does not load`));
    document.head.append(script);
  });
}
