'use strict'
/** `amberbox store verify|gc|du|export|import`: the store of snapshots, without a sandbox. */

const summary = 'checks, cleans and measures the store; snapshots as files'
const usage = `Usage: amberbox store COMMAND [options]

  verify             read and check everything; exit code 1 if something is damaged
  gc                 remove what no snapshot needs, and what killed processes left behind
  du                 how much disk the store and each snapshot use
  export ID FILE     write a snapshot, by id or name, to a new file
  import FILE        take over a snapshot from such a file

  --without FILE     export: leave out the layers listed in FILE, one id per line (see 'layers')
  layers             the ids of the layers that this store has
  --json             the result as one JSON object

The store is that of AMBERBOX_HOME, by default ~/.local/share/amberbox.
`
const options = { json: { type: 'boolean', default: false }, without: { type: 'string' } }

const size = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`)

/** By name: the number of its arguments, what it does, and its result as text. */
function commands(api) {
  const { Sandbox, store } = api
  return {
    verify: {
      args: 0,
      run: () => store.verify(),
      text: ({ snapshots, layers, frames, problems }) => [
        `${snapshots} snapshots, ${layers} layers, ${frames} frames: ${problems.length || 'no'} problems`,
        ...problems.map((p) => `  ${p.snapshots.join(', ') || 'no snapshot is affected'}: ${p.message}`),
      ],
      failed: ({ problems }) => problems.length > 0,
    },
    gc: {
      args: 0,
      run: () => store.gc(),
      text: ({ layers, bytes, unreadable }) =>
        unreadable > 0
          ? [`Nothing removed: ${unreadable} manifests cannot be read. See 'amberbox store verify'`]
          : [`${layers} layers removed, ${size(bytes)}`],
      failed: ({ unreadable }) => unreadable > 0,
    },
    du: {
      args: 0,
      run: () => store.du(),
      text: ({ layerBytes, manifestBytes, unreferencedBytes, snapshots }) => [
        ...snapshots.map((s) => `${size(s.bytes).padStart(10)}  ${s.snapshotId}:${s.tag}`),
        `${size(layerBytes + manifestBytes).padStart(10)}  all; deleting one snapshot frees what is beside its name`,
        ...(unreferencedBytes > 0
          ? [`${size(unreferencedBytes).padStart(10)}  needed by none: 'amberbox store gc'`]
          : []),
      ],
    },
    layers: { args: 0, run: () => store.layers(), text: (layers) => layers },
    export: {
      args: 2,
      run: ([id, file], { without }) => {
        const list = without && require('node:fs').readFileSync(without, 'utf8')
        return Sandbox.exportSnapshot(id, file, { without: list ? list.split(/\s+/).filter(Boolean) : [] })
      },
      text: ({ snapshotId, bytes, layers, leftOut }) => [
        `${snapshotId}: ${size(bytes)}, ${layers} layers, ${leftOut} left out`,
      ],
    },
    import: {
      args: 1,
      run: ([file]) => Sandbox.importSnapshot(file),
      text: ({ snapshotId, names }) => [[snapshotId, ...names].join(' ')],
    },
  }
}

async function run(values, [name, ...args]) {
  const all = commands(require('..'))
  const command = Object.hasOwn(all, name ?? '') ? all[name] : undefined
  if (command === undefined || args.length !== command.args) {
    process.stderr.write(usage)
    return 2
  }
  const result = await command.run(args, values)
  const text = values.json ? JSON.stringify(result, undefined, 2) : command.text(result).join('\n')
  process.stdout.write(`${text}\n`)
  return command.failed?.(result) ? 1 : 0
}

module.exports = { summary, usage, options, run }
