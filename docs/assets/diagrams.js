// Draw the charts of a page with the Mermaid that lies in the site: assets/mermaid, put there by docs/hooks.py.
const blocks = document.querySelectorAll("pre.diagram");
if (blocks.length > 0) {
  const { mermaid } = await import(new URL("mermaid/index.js", import.meta.url));
  const dark = () => document.body.dataset.mdColorScheme === "slate";
  const sources = Array.from(blocks, (block) => block.textContent);
  const draw = async () => {
    mermaid.initialize({ startOnLoad: false, theme: dark() ? "dark" : "neutral", fontFamily: "inherit" });
    for (const [number, block] of blocks.entries()) {
      const { svg } = await mermaid.render(`chart-${number}`, sources[number]);
      block.innerHTML = svg;
      block.classList.add("drawn");
    }
  };
  await draw();
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["data-md-color-scheme"] });
}
