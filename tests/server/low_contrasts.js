() => {
  const rgb = (colour) => {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [red, green, blue] = colour.map((value) => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const ownText = (one) => [...one.childNodes].map((node) => (node.nodeType === 3 ? node.data.trim() : "")).join("");
  const low = [];
  for (const one of document.querySelectorAll("body *")) {
    const text = ownText(one);
    const isSeen = one.getClientRects().length && !one.closest("title, .unseen, .skip, noscript, :disabled");
    if (!text || !isSeen) continue;
    const style = getComputedStyle(one);
    const pair = [light(rgb(one.closest("svg") ? style.fill : style.color)), light(behind(one))];
    if ((Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05) < 4.5) low.push(text);
  }
  return low;
}
