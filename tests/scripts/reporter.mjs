// Tells node.py of each test in a line of JSON: its file, its name, and its error, which is empty for one that passed.
export default async function* report(source) {
  for await (const {type, data} of source) {
    if (type === 'test:stdout' || type === 'test:stderr') yield data.message;
    if ((type !== 'test:pass' && type !== 'test:fail') || data.nesting) continue;
    const {error} = data.details;
    const said = type === 'test:pass' ? '' : String(error?.cause?.stack ?? error?.stack ?? error ?? 'failed');
    yield `RESULT ${JSON.stringify({file: data.file ?? '', name: data.name, error: said})}\n`;
  }
}
