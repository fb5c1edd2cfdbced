#!/usr/bin/env node
'use strict'
/**
 * `npx amberbox COMMAND`. A command is a module with `summary`, `usage` and `run(args)`, which resolves with the exit code;
 * output goes to standard output, complaints to standard error.
 */
const { parseArgs } = require('node:util')

/** By name; loaded when needed, so that `doctor` can still speak where the addon cannot be loaded. */
const COMMANDS = {
  doctor: () => require('./doctor'),
  store: () => require('./store'),
}

function usage() {
  const lines = Object.entries(COMMANDS).map(([name, load]) => `  ${name.padEnd(10)} ${load().summary}`)
  return `Usage: amberbox COMMAND [options]\n\n${lines.join('\n')}\n\nEach command explains itself with --help.\n`
}

async function main(argv) {
  const [name, ...args] = argv
  if (name === undefined || name === '--help' || name === '-h') {
    process.stdout.write(usage())
    return name === undefined ? 2 : 0
  }
  if (name === '--version') {
    process.stdout.write(`${require('../package.json').version}\n`)
    return 0
  }
  if (!Object.hasOwn(COMMANDS, name)) {
    process.stderr.write(`amberbox: there is no command '${name}'\n\n${usage()}`)
    return 2
  }
  const command = COMMANDS[name]()
  try {
    const { values, positionals } = parseArgs({
      args,
      allowPositionals: true,
      options: { ...command.options, help: { type: 'boolean', short: 'h', default: false } },
    })
    if (values.help) {
      process.stdout.write(command.usage)
      return 0
    }
    return await command.run(values, positionals)
  } catch (error) {
    if (error.code?.startsWith?.('ERR_PARSE_ARGS')) {
      process.stderr.write(`amberbox ${name}: ${error.message}\n\n${command.usage}`)
      return 2
    }
    process.stderr.write(`amberbox ${name}: ${error.message}\n`)
    return 1
  }
}

main(process.argv.slice(2)).then((code) => {
  process.exitCode = code
})
