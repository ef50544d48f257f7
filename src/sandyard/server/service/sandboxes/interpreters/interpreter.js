// Runs pieces of JavaScript one after another in one global scope, by the rules of a console: `let`,
// `const` and `class` may be declared again, `await` and `import` may stand outside of functions.
// See interpreter.py for requests and reports. It is started in a sandbox by `node --expose-internals`.
(() => {
  const fs = require('fs'), util = require('util'), inspector = require('inspector');
  const {Readable} = require('stream');
  const TEXT_MAX = 4000000;
  const session = new inspector.Session();
  session.connect();
  const post = (method, params) => new Promise((resolve, reject) => {
    session.post(method, params, (error, found) => (error ? reject(error) : resolve(found)));
  });
  let mark = '', kept, number = 0, stop = () => {};

  const write = (fd, text) => {
    let left = Buffer.from(text);
    while (left.length) {
      try { left = left.subarray(fs.writeSync(fd, left)); }
      catch (error) { if (error.code !== 'EAGAIN') throw error; }
    }
  };
  const report = (letter, value, fd = 1) => write(fd, `\0${mark}${letter}${JSON.stringify(value)
    .replace(/[\u007f-\uffff]/g, (one) => '\\u' + one.charCodeAt(0).toString(16).padStart(4, '0'))}\0`);

  const show = (value, isMain) => {
    const whole = typeof value === 'string' ? {maxStringLength: TEXT_MAX} : {};
    const text = util.inspect(value, whole), found = {text: text.slice(0, TEXT_MAX)};
    report('R', {...found, isMain, truncated: text.length > TEXT_MAX});
  };

  // Scripts of the inspector cannot import, so imports become calls of this function. Relative
  // names are relative to the directory that the interpreter was started in.
  const load = (name, options) => import(name, options);
  const hidden = (name, value) => Object.defineProperty(globalThis, name, {value, enumerable: false});
  hidden('__sandyard_import', load);
  hidden('__sandyard_keep', (value) => { kept = value; });
  hidden('require', require);
  hidden('display', (...values) => values.forEach((one) => show(one, false)));

  const parsed = (code) => {
    try {
      const {Parser} = require('internal/deps/acorn/acorn/dist/acorn');
      const options = {ecmaVersion: 'latest', sourceType: 'module', allowAwaitOutsideFunction: true,
        allowReturnOutsideFunction: false, allowHashBang: true};
      return Parser.parse(code, options);
    } catch { return null; }
  };
  const declared = (node) => {
    const parts = [], names = [];
    for (const one of node.specifiers) {
      if (one.type === 'ImportNamespaceSpecifier') parts.push(one.local.name);
      else {
        const name = one.imported === undefined ? 'default' : one.imported.name ?? one.imported.value;
        names.push(`${JSON.stringify(name)}: ${one.local.name}`);
      }
    }
    if (names.length) parts.push(`{${names.join(', ')}}`);
    const loading = `await __sandyard_import(${node.source.raw})`;
    if (!parts.length) return `${loading};`;
    return parts.map((one) => `const ${one} = ${loading};`).join(' ');
  };
  const withoutImports = (code) => {
    if (!/\bimport\b/.test(code)) return code;
    const tree = parsed(code), edits = [];
    const visit = (node) => {
      if (node === null || typeof node !== 'object') return;
      if (node.type === 'ImportDeclaration') { edits.push([node.start, node.end, declared(node)]); return; }
      if (node.type === 'ImportExpression') edits.push([node.start, node.start + 6, '__sandyard_import']);
      for (const one of Object.values(node)) Array.isArray(one) ? one.forEach(visit) : visit(one);
    };
    visit(tree);
    edits.sort((one, other) => other[0] - one[0]);
    for (const [start, end, text] of edits) code = code.slice(0, start) + text + code.slice(end);
    return code;
  };

  const told = (failed) => {
    try {
      const stack = String(failed?.stack ?? failed).split('\n');
      const own = stack.findIndex((line) => /^\s+at (Session\.post|new Promise|post) \(/.test(line));
      const shown = own < 0 ? stack : stack.slice(0, own);
      return {name: String(failed?.name ?? 'Error'), value: String(failed?.message ?? failed),
        traceback: shown.join('\n')};
    } catch { return {name: 'Error', value: 'it does not say', traceback: ''}; }
  };
  const value = async (remote) => {
    if (remote.type === 'undefined') return undefined;
    const {objectId, unserializableValue} = remote;
    const given = objectId ? {objectId} : unserializableValue ? {unserializableValue} : {value: remote.value};
    await post('Runtime.callFunctionOn', {functionDeclaration: '(one) => __sandyard_keep(one)',
      arguments: [given], executionContextId: context});
    const found = kept;
    kept = undefined;
    return found;
  };
  let context;
  const run = async (code, timeout) => {
    // As in a console, what could be a block or an object is an object.
    const isObject = /^\s*\{/.test(code) && !/;\s*$/.test(code) && parsed(`(${code}\n)`) !== null;
    const expression = `${withoutImports(isObject ? `(${code}\n)` : code)}\n//# sourceURL=code-${number}`;
    const limit = timeout > 0 ? {timeout} : {};
    const done = await post('Runtime.evaluate',
      {expression, replMode: true, objectGroup: 'run', ...limit});
    if (done.exceptionDetails) {
      const {exception, text} = done.exceptionDetails;
      throw exception ? await value(exception) : new Error(text);
    }
    return value(done.result);
  };
  class InterruptedError extends Error { get name() { return 'InterruptedError'; } }
  const answer = async (wish) => {
    mark = wish.mark;
    number += 1;
    report('B', {}, 2);
    report('B', {});
    const input = Readable.from(wish.stdin ? [Buffer.from(wish.stdin)] : []);
    Object.defineProperty(input, 'fd', {value: 0});
    Object.defineProperty(process, 'stdin', {value: input, configurable: true});
    let error = null;
    try {
      const code = wish.types ? require('module').stripTypeScriptTypes(wish.code, {mode: 'transform'})
        : wish.code;
      const stopped = new Promise((_, reject) => { stop = () => reject(new InterruptedError('interrupted')); });
      const found = await Promise.race([run(code, wish.timeout), stopped]);
      if (found !== undefined) show(found, true);
    } catch (failed) { error = told(failed); }
    stop = () => {};
    await post('Runtime.releaseObjectGroup', {objectGroup: 'run'}).catch(() => {});
    report('E', {}, 2);
    report('E', {error});
  };

  process.on('SIGINT', () => stop());
  process.on('uncaughtException', (error) => console.error(error));
  process.on('unhandledRejection', (error) => console.error(error));
  const asked = process.stdin;
  let turn = new Promise((resolve) => {
    session.once('Runtime.executionContextCreated', ({params}) => {
      context = params.context.id;
      resolve();
    });
    session.post('Runtime.enable');
  });
  let rest = '';
  asked.setEncoding('utf8');
  asked.on('data', (data) => {
    const lines = (rest + data).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      let wish;
      try { wish = JSON.parse(line); } catch { continue; }  // the rest of a request that was broken off
      turn = turn.then(() => answer(wish));
    }
  });
})();
