// Drives every public method of E2B's JavaScript SDK against a server.
//
//     node drive.mjs TEMPLATE
//
// The server and the key are in the SDK's environment variables. It prints one line of JSON for
// each method: what came of it. See drive.py, which does the same in Python.

import assert from 'node:assert/strict'
import { Sandbox, CommandExitError } from 'e2b'

const template = process.argv[2]
const checks = new Map()

function check(names, work) {
  for (const name of names) checks.set(name, work)
}

async function until(condition) {
  const end = Date.now() + 60_000
  while (!(await condition())) {
    assert(Date.now() < end, 'not in time')
    await new Promise((done) => setTimeout(done, 200))
  }
}

// --- sandboxes -------------------------------------------------------------------------------

check(['Sandbox.create', 'Sandbox.getInfo', 'Sandbox.list', 'Sandbox.isRunning', 'Sandbox.kill',
  'Sandbox.getFullInfo'], async () => {
  const made = await Sandbox.create(template, {
    timeoutMs: 99_000, metadata: { a: 'b ü' }, envs: { X: 'y z' },
  })
  const info = await made.getInfo()
  assert.deepEqual(info.metadata, { a: 'b ü' })
  assert.equal((await Sandbox.getInfo(made.sandboxId)).sandboxId, made.sandboxId)
  assert.equal((await Sandbox.getFullInfo(made.sandboxId)).sandboxId, made.sandboxId)
  assert(info.endAt - info.startedAt >= 99_000)  // from when it runs
  assert(info.endAt - Date.now() <= 99_000)
  const pages = Sandbox.list({ query: { metadata: { a: 'b ü' } }, limit: 1 })
  assert.deepEqual((await pages.nextItems()).map((one) => one.sandboxId), [made.sandboxId])
  assert(await made.isRunning())
  assert.equal((await made.commands.run('echo $X')).stdout, 'y z\n')
  assert.equal(await made.kill(), true)
  assert.equal(await made.isRunning(), false)
  assert.equal(await Sandbox.kill(made.sandboxId), false)
})

check(['Sandbox.connect', 'Sandbox.setTimeout'], async (box) => {
  const again = await Sandbox.connect(box.sandboxId, { timeoutMs: 900_000 })
  assert.equal((await again.commands.run('echo again')).stdout, 'again\n')
  await box.setTimeout(600_000)
  const left = (await box.getInfo()).endAt - Date.now()
  assert(left > 500_000 && left < 601_000)
})

check(['Sandbox.pause', 'Sandbox.betaPause'], async (box) => {
  await box.commands.run('echo kept > /dev/shm/kept')
  await box.pause()
  assert.equal(await box.isRunning(), false)
  await box.connect()
  assert.equal(await box.files.read('/dev/shm/kept'), 'kept\n')
  await box.betaPause()
  await box.connect({ timeoutMs: 900_000 })
})

check(['Sandbox.fork', 'Sandbox.createSnapshot', 'Sandbox.listSnapshots',
  'Sandbox.deleteSnapshot'], async (box) => {
  await box.files.write('here', 'before')
  const snapshot = await box.createSnapshot()
  await box.files.write('here', 'after')
  const found = await Sandbox.listSnapshots({ sandboxId: box.sandboxId }).nextItems()
  assert(found.some((one) => one.snapshotId === snapshot.snapshotId))
  const old = await Sandbox.create(snapshot.snapshotId, { timeoutMs: 600_000 })
  const [fork] = await box.fork({ timeoutMs: 600_000 })
  assert.equal(await old.files.read('here'), 'before')
  assert.equal(await fork.files.read('here'), 'after')
  await old.kill()
  await fork.kill()
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
})

check(['Sandbox.getMetrics'], async (box) => {
  const [sample] = await box.getMetrics()
  assert(sample.cpuCount >= 1 && sample.memUsed < sample.memTotal)
})

check(['Sandbox.getHost'], async (box) => {
  await box.commands.run('mkdir -p /tmp/www; echo shown > /tmp/www/page')
  const serving = await box.commands.run(
    'cd /tmp/www; exec python3 -m http.server 8000', { background: true })
  const url = `https://${box.getHost(8000)}/page`
  await until(async () => (await fetch(url)).status === 200)
  assert.equal(await (await fetch(url)).text(), 'shown\n')
  await serving.kill()
})

check(['Sandbox.uploadUrl', 'Sandbox.downloadUrl'], async (box) => {
  const form = new FormData()
  form.append('file', new Blob(['up']), 'up')
  const up = await box.uploadUrl('up', { useSignatureExpiration: 60_000 })
  assert.equal((await fetch(up, { method: 'POST', body: form })).status, 200)
  assert.equal(await (await fetch(await box.downloadUrl('up'))).text(), 'up')
  const other = (await box.downloadUrl('up')).replace('path=up', 'path=other')
  assert.equal((await fetch(other)).status, 401)
})

check(['Sandbox.updateNetwork'], async (box) => {
  await box.updateNetwork({ allowOut: ['a.test'], denyOut: ['0.0.0.0/0'] })
  await assert.rejects(box.updateNetwork({ allowOut: ['a.test'] }), /network\.allowOut/)
  await box.updateNetwork({})
})

check(['Sandbox.getMcpUrl', 'Sandbox.getMcpToken'], async (box) => {
  assert(box.getMcpUrl().startsWith('https://'))
  await box.commands.run(
    'mkdir -p /etc/mcp-gateway; printf token > /etc/mcp-gateway/.token', { user: 'root' })
  assert.equal(await box.getMcpToken(), 'token')
})

// --- commands --------------------------------------------------------------------------------

check(['Commands.run', 'CommandHandle.wait'], async (box) => {
  const told = await box.commands.run('echo out; echo err >&2; pwd; echo $A', {
    cwd: '/tmp', envs: { A: "ü 'q'" }, user: 'root',
  })
  assert.deepEqual([told.stdout, told.stderr, told.exitCode], ["out\n/tmp\nü 'q'\n", 'err\n', 0])
  await assert.rejects(
    box.commands.run('exit 7'), (error) => error instanceof CommandExitError && error.exitCode === 7)
  const large = await box.commands.run("head -c 3000000 /dev/zero | tr '\\0' x")
  assert.equal(large.stdout.length, 3_000_000)
  const pieces = []
  const handle = await box.commands.run(
    'for i in 1 2 3; do echo $i; done', { background: true, onStdout: (one) => pieces.push(one) })
  await handle.wait()
  assert.equal(pieces.join(''), '1\n2\n3\n')
  await assert.rejects(box.commands.run('sleep 60', { timeoutMs: 1000 }))
  await assert.rejects(box.commands.run('true', { user: 'ghost' }), /ghost/)
})

check(['Commands.list', 'Commands.connect', 'Commands.kill', 'CommandHandle.kill',
  'CommandHandle.disconnect'], async (box) => {
  const handle = await box.commands.run('sleep 60', { background: true })
  assert((await box.commands.list()).some((one) => one.pid === handle.pid))
  const other = await box.commands.connect(handle.pid)
  assert.equal(other.pid, handle.pid)
  await other.disconnect()
  assert.equal(await handle.kill(), true)
  await assert.rejects(handle.wait())
  assert.equal(await box.commands.kill(4_000_000), false)
  const again = await box.commands.run('sleep 60', { background: true })
  assert.equal(await box.commands.kill(again.pid), true)
  await assert.rejects(again.wait())
})

check(['Commands.sendStdin', 'Commands.closeStdin', 'CommandHandle.sendStdin',
  'CommandHandle.closeStdin', 'Commands.streamInput'], async (box) => {
  const handle = await box.commands.run('cat', { background: true, stdin: true })
  await box.commands.sendStdin(handle.pid, 'one ')
  await handle.sendStdin('two')
  await box.commands.closeStdin(handle.pid)
  assert.equal((await handle.wait()).stdout, 'one two')
})

check(['Pty.create', 'Pty.connect', 'Pty.resize', 'Pty.sendInput', 'Pty.kill',
  'Pty.streamInput'], async (box) => {
  let output = ''
  const onData = (data) => { output += new TextDecoder().decode(data) }
  const handle = await box.pty.create({ cols: 80, rows: 24, onData })
  await box.pty.resize(handle.pid, { cols: 99, rows: 33 })
  const again = await box.pty.connect(handle.pid, { onData })
  await box.pty.sendInput(handle.pid, new TextEncoder().encode('stty size; exit\n'))
  await again.wait()
  await handle.wait()
  assert(output.includes('33 99'), output)
  const other = await box.pty.create({ cols: 80, rows: 24, onData })
  assert.equal(await box.pty.kill(other.pid), true)
  await assert.rejects(other.wait())
})

// --- files -----------------------------------------------------------------------------------

check(['Filesystem.write', 'Filesystem.read', 'Filesystem.writeFiles'], async (box) => {
  const told = await box.files.write('a/b.txt', 'tëxt', { metadata: { k: 'v' } })
  assert.equal(told.path, '/home/user/a/b.txt')
  assert.equal(await box.files.read('a/b.txt'), 'tëxt')
  const data = new Uint8Array(1_000_000).map((_, at) => at % 251)
  for (const more of [{}, { gzip: true }, { useOctetStream: true }]) {
    await box.files.write('/tmp/data', new Blob([data]), more)
    const found = await box.files.read('/tmp/data', { format: 'bytes' })
    assert(Buffer.from(found).equals(Buffer.from(data)))
  }
  const stream = await box.files.read('/tmp/data', { format: 'stream' })
  const pieces = []
  for await (const one of stream) pieces.push(one)
  assert(Buffer.concat(pieces).equals(Buffer.from(data)))
  const many = [...Array(10).keys()].map((one) => ({ path: `/tmp/many/${one}`, data: `${one}` }))
  const written = await box.files.writeFiles(many)
  assert.deepEqual(written.map((one) => one.path), many.map((one) => one.path))
})

check(['Filesystem.list', 'Filesystem.exists', 'Filesystem.getInfo', 'Filesystem.makeDir',
  'Filesystem.rename', 'Filesystem.remove'], async (box) => {
  assert.equal(await box.files.makeDir('tree/deep'), true)
  assert.equal(await box.files.makeDir('tree/deep'), false)
  await box.files.write('tree/deep/file', '1')
  const listed = await box.files.list('tree', { depth: 2 })
  assert.deepEqual(listed.map((one) => one.name), ['deep', 'file'])
  const info = await box.files.getInfo('tree/deep/file')
  assert.deepEqual([info.size, info.owner], [1, 'user'])
  const moved = await box.files.rename('tree/deep/file', 'tree/new/place')
  assert.equal(moved.path, '/home/user/tree/new/place')
  await box.files.remove('tree')
  assert.equal(await box.files.exists('tree'), false)
  await assert.rejects(box.files.read('tree/absent'))
})

check(['Filesystem.watchDir'], async (box) => {
  await box.files.makeDir('watched')
  const events = []
  const handle = await box.files.watchDir('watched', (one) => { events.push(one) }, { recursive: true })
  await box.files.write('watched/a', '1')
  await box.files.rename('watched/a', 'watched/b')
  await box.files.remove('watched/b')
  await until(() => events.some((one) => one.type === 'remove'))
  assert.deepEqual(events.map((one) => `${one.name} ${one.type}`), [
    'a create', 'a chmod', 'a write', 'a rename', 'b create', 'b remove'])
  await handle.stop()
})

// --- git -------------------------------------------------------------------------------------

check(['Git.init', 'Git.add', 'Git.commit', 'Git.status', 'Git.branches', 'Git.createBranch',
  'Git.checkoutBranch', 'Git.deleteBranch', 'Git.configureUser', 'Git.setConfig', 'Git.getConfig',
  'Git.reset', 'Git.restore', 'Git.clone', 'Git.push', 'Git.pull', 'Git.remoteAdd',
  'Git.remoteGet', 'Git.dangerouslyAuthenticate'], async (box) => {
  const git = box.git
  await box.commands.run('git init -q --bare /tmp/far.git')
  await git.init('repo', { initialBranch: 'main' })
  await git.configureUser('Somebody', 'some@example.org')
  await git.setConfig('core.editor', 'true', { scope: 'local', path: 'repo' })
  assert.equal((await git.getConfig('core.editor', { scope: 'local', path: 'repo' })).trim(), 'true')
  await box.files.write('repo/file', '1')
  assert.equal((await git.status('repo')).fileStatus.length, 1)
  await git.add('repo')
  await git.commit('repo', 'first')
  await git.createBranch('repo', 'other')
  await git.checkoutBranch('repo', 'main')
  assert.deepEqual((await git.branches('repo')).branches.sort(), ['main', 'other'])
  await git.deleteBranch('repo', 'other', { force: true })
  await box.files.write('repo/file', '2')
  await git.restore('repo', { paths: ['file'] })
  await git.reset('repo', { mode: 'hard' })
  await git.remoteAdd('repo', 'origin', '/tmp/far.git')
  assert.equal((await git.remoteGet('repo', 'origin')).trim(), '/tmp/far.git')
  await git.push('repo', { remote: 'origin', branch: 'main' })
  await git.clone('/tmp/far.git', { path: 'copy', branch: 'main' })
  assert.equal(await box.files.read('copy/file'), '1')
  await git.pull('copy', { remote: 'origin', branch: 'main' })
  await git.dangerouslyAuthenticate({
    username: 'somebody', password: 'secret', host: 'git.example.org',
  })
})

// --- what there is ---------------------------------------------------------------------------

// Not public: TypeScript marks them so, and JavaScript shows them.
const OURS_NOT = new Set([
  'constructor', 'length', 'name', 'prototype', 'resolveApiOpts', 'fileUrl', 'createSandbox',
  'forkSandbox', 'connectSandbox', 'defaultTemplate', 'defaultMcpTemplate', 'runGit', 'runShell',
  'getRemoteUrl', 'resolveRemoteName', 'withRemoteCredentials', 'hasUpstream', 'start',
  'checkHealth', 'flushDecoders', 'resolveOpts', 'handleEvents', 'iterateEvents', 'exitCode', 'error', 'stderr', 'stdout', 'pid',
])

function namesOf(value) {
  const found = new Set()
  for (let one = value; one && one !== Object.prototype && one !== Function.prototype;
    one = Object.getPrototypeOf(one)) {
    for (const name of Object.getOwnPropertyNames(one)) {
      if (!OURS_NOT.has(name) && !name.startsWith('_')) {
        const about = Object.getOwnPropertyDescriptor(one, name)
        if (typeof about.value === 'function') found.add(name)
      }
    }
  }
  return found
}

const box = await Sandbox.create(template, { timeoutMs: 900_000 })
const outcomes = new Map()
let failures = 0
try {
  const handle = await box.commands.run('true', { background: true })
  await handle.wait()
  const prototype = Object.getPrototypeOf
  const kinds = {
    Sandbox: [prototype(box), Sandbox], Commands: [prototype(box.commands)],
    Pty: [prototype(box.pty)], Filesystem: [prototype(box.files)], Git: [prototype(box.git)],
    CommandHandle: [prototype(handle)],
  }
  const methods = new Set()
  for (const [kind, values] of Object.entries(kinds)) {
    for (const value of values) for (const name of namesOf(value)) methods.add(`${kind}.${name}`)
  }
  for (const method of [...methods].sort()) {
    const work = checks.get(method)
    if (work && !outcomes.has(work)) {
      try {
        await work(box)
        outcomes.set(work, 'works')
      } catch (error) {
        outcomes.set(work, `failed: ${error?.stack ?? error}`.slice(0, 2000))
        failures += 1
      }
    }
    const outcome = work ? outcomes.get(work) : 'not driven'
    process.stdout.write(JSON.stringify({ method, outcome }) + '\n')
  }
} finally {
  await box.kill()
}
process.exit(0)
