// Draw the charts of a page with the Mermaid that lies in the site: assets/mermaid, put there by docs/hooks.py.
const blocks = document.querySelectorAll("pre.diagram");
if (blocks.length > 0) {
  const { mermaid } = await import(new URL("mermaid/index.js", import.meta.url));
  const fontFamily = getComputedStyle(document.body).fontFamily;  // the font in which labels are measured
  const charts = Array.from(blocks, (block) => {
    const chart = document.createElement("div");
    chart.className = "chart";
    block.after(chart);
    return { block, chart, source: block.querySelector("code").textContent };
  });
  const draw = async () => {
    const dark = document.body.dataset.mdColorScheme === "slate";
    mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "neutral", fontFamily, flowchart: { wrappingWidth: 320 } });
    for (const [number, { block, chart, source }] of charts.entries()) {
      try {
        const { svg } = await mermaid.render(`chart-${number}`, source);
        chart.innerHTML = svg;
        block.hidden = true;
      } catch (error) {
        console.error(error);  // the text of the chart stays readable
      }
      block.classList.add("tried");
    }
  };
  await draw();
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["data-md-color-scheme"] });
}
